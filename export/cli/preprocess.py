"""`enginecast preprocess`: what control networks are shown, made of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.errors import InvalidInput, MissingDependency, NotFound
from runtime.files import read_regular
from runtime.limits import PICTURE_BYTES
from runtime.vision.images import decode_image, encode_image

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
MOST = 1000


@app.callback()
def preprocess() -> None:
    """Make a control's picture of a photograph."""


@app.command()
def canny(
    picture: Annotated[Path, typer.Argument(help="Picture file.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    low: Annotated[int, typer.Option(min=0, max=MOST, help="Gradient above which an edge is continued.")] = 100,
    high: Annotated[int, typer.Option(min=0, max=MOST, help="Gradient above which an edge begins.")] = 200,
) -> None:
    """Find edges: white on black."""
    if low > high:
        raise InvalidInput("low", f"is {low}, expected at most --high, {high}")
    try:
        from export import preprocess
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "cv2", "export") from None
    try:
        data = read_regular(picture, PICTURE_BYTES.most)
    except OSError as error:
        raise NotFound(f"picture {picture} cannot be read: {error.strerror}") from None
    out.write_bytes(encode_image(preprocess.canny(decode_image(data, str(picture)), low, high)))
    print(out)
