"""`enginecast caption`: a caption of every picture, by a chat model. A caption is an answer without a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from serving.cli.answering import Answering
from serving.cli.options import ModelOptions, with_fields, with_model_options


@with_model_options
@with_fields("answering", Answering)
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Pictures to describe.")],
    where: ModelOptions,
    answering: Answering,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask of each picture. Without it: what the model writes captions for.")
    ] = None,
) -> None:
    """Describe pictures: a line for each caption, the picture's path, a tab and the caption."""
    from serving.cli import terminal
    from serving.dialects.python.requests import caption_request

    pictures = [terminal.read_image(path) for path in images]
    asked = None if prompt is None else terminal.unicode("prompt", prompt)
    given = answering.given()
    with where.session(caption_request(pictures[0], asked, given)) as session:
        for path, answer in zip(images, session.captions(pictures, asked, **given), strict=True):
            terminal.caption(path, answer, where.verbose)


COMMAND: Final = caption
