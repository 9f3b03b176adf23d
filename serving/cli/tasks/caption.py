"""`enginecast caption`: a caption of every picture, by a chat model. A caption is an answer without a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from runtime.errors import InvalidInput
from serving.cli.answering import Answering
from serving.cli.options import ModelOptions, with_fields, with_model_options

if TYPE_CHECKING:
    from runtime.tasks.chat import ChatRequest
    from serving.dialects.python.requests import PictureLike

EDGE: Final = 32
"""Edge in pixels of the picture that options are checked with, before any is read."""


@with_model_options
@with_fields("answering", Answering)
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="PICTURE|DIR...", help="Pictures to describe.")],
    where: ModelOptions,
    answering: Answering,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask of each picture. Without it: what the model writes captions for.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a line of JSON for each picture to this file. Pictures that it has are left out: run again "
            "after an interruption, it goes on.",
        ),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Take folders in folders, too.")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try pictures again for which FILE has an error.")
    ] = False,
) -> None:
    """Describe pictures: a line for each caption, the picture's path, a tab and the caption. With --output, also whole
    folders, into a file.
    """
    from serving.cli import terminal
    from serving.dialects.python.requests import caption_request

    asked, given = None if prompt is None else terminal.unicode("prompt", prompt), answering.given()

    def request(picture: PictureLike) -> ChatRequest:
        return caption_request(picture, asked, given)

    if output is not None:
        _into_file(images, output, where, request, (recursive, retry_errors))
        return
    for name, value in (("recursive", recursive), ("retry_errors", retry_errors)):
        if value:
            raise InvalidInput(name, "belongs to --output: captions of folders are written to a file")
    for path in images:
        if path.is_dir():
            raise InvalidInput("images", f"{path} is a folder: give --output FILE, to which its captions are written")
    pictures = [terminal.read_image(path) for path in images]
    with where.session(request(pictures[0])) as session:
        for path, answer in zip(images, session.captions(pictures, asked, **given), strict=True):
            terminal.caption(path, answer, where.verbose)


def _into_file(
    places: Sequence[Path],
    output: Path,
    where: ModelOptions,
    request: Callable[[PictureLike], ChatRequest],
    how: tuple[bool, bool],
) -> None:
    """Caption what `output` does not have yet. Exits with 1 if the file has errors of pictures."""
    import numpy as np

    from serving.cli import captions, terminal
    from serving.dialects.python.results import Answer

    recursive, retry = how
    example, pictures = request(np.zeros((EDGE, EDGE, 3), np.uint8)), captions.pictures_in(places, recursive)
    with captions.opened(output, retry) as file:
        left = {name: path for name, path in pictures.items() if name not in file.done}
        failed = sum("error" in file.done[name] for name in pictures.keys() - left.keys())
        if left:
            with where.session(example) as session, terminal.counting("captions", len(left)) as advance:
                for name, result in captions.captioned(session, left, lambda path: request(terminal.read_image(path))):
                    file.add(name, result)
                    advance()
                    if not isinstance(result, Answer):
                        failed += 1
                        terminal.say(f"{name}: {result}")
    before = f", {len(pictures) - len(left)} of them before" if len(left) < len(pictures) else ""
    errors = f", {failed} with an error (--retry-errors tries them again)" if failed else ""
    terminal.say(f"{len(pictures)} pictures in {output}{before}{errors}")
    if failed:
        raise typer.Exit(1)


COMMAND: Final = caption
