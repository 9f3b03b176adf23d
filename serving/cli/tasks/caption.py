"""`enginecast caption`: a caption of every picture, by a chat model. A caption is an answer without a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from serving.cli.options import UINT32, ModelOptions, with_model_options


@with_model_options
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Pictures to describe.")],
    where: ModelOptions,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask of each picture. Without it: what the model writes captions for.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Longest caption, in tokens.")] = None,
    beams: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Above 1: search for the likeliest of so many captions.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With several beams: the larger, the longer the captions.")
    ] = None,
) -> None:
    """Describe pictures: a line for each, its path, a tab and the caption."""
    from serving.cli import terminal
    from serving.dialects.python.requests import ChatOptions, caption_request

    pictures = [terminal.read_image(path) for path in images]
    asked = None if prompt is None else terminal.unicode("prompt", prompt)
    given = ChatOptions(max_tokens=max_tokens, beams=beams, length_penalty=length_penalty)
    with where.session(caption_request(pictures[0], asked, given)) as session:
        for path, answer in zip(images, session.captions(pictures, asked, **given), strict=True):
            terminal.caption(path, answer, where.verbose)


COMMAND: Final = caption
