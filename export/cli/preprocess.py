"""`enginecast preprocess`: what control networks are shown, made of photographs."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from runtime.errors import InvalidInput, MissingDependency, NotFound, quoted
from runtime.files import read_regular
from runtime.limits import PICTURE_BYTES
from runtime.vision.images import Picture, decode_image, encode_image

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
    out.write_bytes(encode_image(preprocess.canny(_read(picture), low, high)))
    print(out)


@app.command()
def depth(
    picture: Annotated[Path, typer.Argument(help="Picture file.")],
    model: Annotated[Path, typer.Option(help="ONNX file of a model of depth, such as Depth Anything or MiDaS small.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    edge: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Edge that pictures are resized to, where the model leaves it open."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="What is subtracted from colors of 0 to 1, such as 0.5,0.5,0.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="What they are divided by then.")] = None,
) -> None:
    """Estimate depth: near is bright. Without --edge, --mean and --std, they are those of a preprocessor_config.json
    beside the model or in the folder above it, else those of Depth Anything.
    """
    numbers = _numbers("mean", mean), _numbers("std", std)
    try:
        from export.depth import DepthModel
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "onnxruntime", "export") from None
    pixels = _read(picture)
    out.write_bytes(encode_image(DepthModel.open(model, edge, *numbers)(pixels)))
    print(out)


def _read(picture: Path) -> Picture:
    """A picture file. Raises NotFound and InvalidInput."""
    try:
        data = read_regular(picture, PICTURE_BYTES.most)
    except OSError as error:
        raise NotFound(f"picture {picture} cannot be read: {error.strerror}") from None
    return decode_image(data, str(picture))


def _numbers(option: str, text: str | None) -> tuple[float, float, float] | None:
    """Three numbers of an option, which are above 0 where they divide. Raises InvalidInput."""
    if text is None:
        return None
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise InvalidInput(option, f"is {quoted(text)}, expected three numbers R,G,B such as 0.5,0.5,0.5") from None
    if not all(isfinite(one) and (one > 0 or option == "mean") for one in (red, green, blue)):
        raise InvalidInput(option, f"is {quoted(text)}, expected finite numbers{', above 0' * (option == 'std')}")
    return red, green, blue
