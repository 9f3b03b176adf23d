"""Options of `generate` that say more than a value: parts of the bundle, a picture to draw on, and a refiner."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from runtime.errors import InvalidInput, quoted

if TYPE_CHECKING:
    from serving.dialects.python.requests import Control, Style

REFINED_FROM: Final = 0.8
"""Where a refiner goes on, as in the paper (Podell et al. 2023, section 2.5): the last fifth of the noise levels."""
CONTROL: Final = re.compile(
    r"(?P<name>[^=]+)=(?P<image>.+?)(:(?P<scale>\d*\.?\d+))?(@(?P<start>\d*\.?\d+)-(?P<end>\d*\.?\d+))?"
)
STYLE: Final = re.compile(r"(?P<name>[^=]+)=(?P<image>.+?)(:(?P<scale>\d*\.?\d+))?")


@dataclass(frozen=True)
class Added:
    """Parts of the bundle that count in the picture."""

    style: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PICTURE[:SCALE]",
            help="Picture file for an image adapter of the bundle, and how much it counts (1). Repeat for several.",
        ),
    ] = None
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PICTURE[:SCALE][@START-END]",
            help="Picture file for a control network of the bundle, how much it counts (1), and in which shares of the "
            "steps (0-1). Repeat for several.",
        ),
    ] = None
    guess_mode: Annotated[
        bool | None,
        typer.Option(
            "--guess-mode",
            help="Controls count less where what they add is fine, and not for the negative prompt: they are followed "
            "without a prompt, too.",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SCALE]", help="A LoRA of the bundle, and how much of it. Repeat for several."),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options of the request. Raises InvalidInput."""
        return {
            "styles": [parse_style(text) for text in self.style or ()],
            "controls": [parse_control(text) for text in self.control or ()],
            "guess_mode": self.guess_mode,
            "loras": scales(self.lora or []),
        }


@dataclass(frozen=True)
class Canvas:
    """The picture that is drawn on, and which part of it."""

    image: Annotated[
        Path | None,
        typer.Option(
            help="Picture file to begin with (image to image), at its own size or resized to --width and --height."
        ),
    ] = None
    strength: Annotated[
        float | None, typer.Option(help="How much of --image is drawn anew, 0 to 1: the share of the steps.")
    ] = None
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture file of the size of --image: only its white part is drawn anew (inpainting)."),
    ] = None
    mask_blur: Annotated[
        float | None, typer.Option(help="Softens the mask's border: standard deviation in pixels.")
    ] = None
    keep_unmasked: Annotated[
        bool | None,
        typer.Option(
            help="What is not drawn is copied from the picture, bit for bit, or as the autoencoder renders it."
        ),
    ] = None
    mask_fill: Annotated[
        str | None,
        typer.Option(help='What the drawn part begins with: "original", "noise" or "nothing". Default: original.'),
    ] = None
    extend: Annotated[
        str | None,
        typer.Option(metavar="LEFT,TOP,RIGHT,BOTTOM", help="Pixels to add to --image and to draw (outpainting)."),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options of the request. Raises InvalidInput."""
        return asdict(self) | {"extend": None if self.extend is None else parse_edges(self.extend)}


SIZE: Final = "HEIGHT,WIDTH"
PLACE: Final = "TOP,LEFT"


@dataclass(frozen=True)
class Conditions:
    """What Stable Diffusion XL and its refiner take besides a prompt, in pixels."""

    original_size: Annotated[
        str | None,
        typer.Option(metavar=SIZE, help="XL: the size that it looks as if it was scaled from. Default: its own."),
    ] = None
    crop_top_left: Annotated[
        str | None, typer.Option(metavar=PLACE, help="XL: where it looks as if it was cropped. Default: 0,0.")
    ] = None
    target_size: Annotated[
        str | None, typer.Option(metavar=SIZE, help="XL: the size that it is to look like. Default: its own.")
    ] = None
    aesthetic_score: Annotated[
        float | None, typer.Option(help="Refiner: how beautiful it is to be, 0 to 10. Default: 6.")
    ] = None
    negative_original_size: Annotated[
        str | None, typer.Option(metavar=SIZE, help="The same for the negative prompt. Default: that of the prompt.")
    ] = None
    negative_crop_top_left: Annotated[str | None, typer.Option(metavar=PLACE, help="See above.")] = None
    negative_target_size: Annotated[str | None, typer.Option(metavar=SIZE, help="See above.")] = None
    negative_aesthetic_score: Annotated[float | None, typer.Option(help="See above. Default: 2.5.")] = None

    def sizes(self) -> dict[str, Any]:
        """Those of every model of XL. Raises InvalidInput."""
        return {name: parse_pair(name, text) for name, text in asdict(self).items() if isinstance(text, str)}

    def scores(self) -> dict[str, Any]:
        """Those of the refiner alone."""
        return {name: number for name, number in asdict(self).items() if isinstance(number, float)}


@dataclass(frozen=True)
class Refining:
    """A second model that goes on with what the first one drew."""

    refiner: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]DIR|NAME",
            help="Bundle that draws the rest, such as the refiner of Stable Diffusion XL; without --bundle, a model of "
            "the server.",
        ),
    ] = None
    refine_from: Annotated[
        float | None,
        typer.Option(help="Share of the schedule at which --refiner goes on, between 0 and 1. Default: 0.8."),
    ] = None

    def handover(self) -> float | None:
        """Where the refiner goes on, as a share of the schedule; None without one. Raises InvalidInput."""
        if self.refiner is None and self.refine_from is not None:
            raise InvalidInput("refine_from", "says where a refiner goes on: give a refiner, or leave it out")
        if self.refiner is None:
            return None
        return REFINED_FROM if self.refine_from is None else self.refine_from


def parse_control(text: str) -> Control:
    """From NAME=PICTURE[:SCALE][@START-END]. Raises InvalidInput, NotFound."""
    from serving.dialects.python.requests import Control

    found = CONTROL.fullmatch(text)
    if found is None:
        raise InvalidInput("control", f"is {quoted(text)}, expected NAME=PICTURE[:SCALE][@START-END]")
    numbers = {name: float(found[name]) for name in ("scale", "start", "end") if found[name] is not None}
    return Control(found["name"], Path(found["image"]), **numbers)


def parse_style(text: str) -> Style:
    """From NAME=PICTURE[:SCALE]. Raises InvalidInput."""
    from serving.dialects.python.requests import Style

    found = STYLE.fullmatch(text)
    if found is None:
        raise InvalidInput("style", f"is {quoted(text)}, expected NAME=PICTURE[:SCALE]")
    return Style(found["name"], Path(found["image"]), float(found["scale"] or 1))


def parse_pair(option: str, text: str) -> tuple[int, int]:
    """Two lengths of an option, in pixels. Raises InvalidInput."""
    down, across = _lengths(option, text, 2, f"two lengths in pixels, {SIZE} or {PLACE}, such as 768,1024")
    return down, across


def parse_edges(text: str) -> tuple[int, int, int, int]:
    """From LEFT,TOP,RIGHT,BOTTOM. Raises InvalidInput."""
    left, top, right, bottom = _lengths("extend", text, 4, "LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,128,0")
    return left, top, right, bottom


def _lengths(option: str, text: str, count: int, expected: str) -> list[int]:
    """So many whole numbers with commas between."""
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise InvalidInput(option, f"is {quoted(text)}, expected {expected}")
    return found


def scales(loras: Iterable[str]) -> dict[str, float]:
    """The scale of each LoRA by its name. Raises InvalidInput."""
    found: dict[str, float] = {}
    for text in loras:
        name, colon, scale = text.partition(":")
        try:
            number = float(scale) if colon else 1.0
        except ValueError:
            raise InvalidInput("lora", f"is {quoted(text)}, expected NAME or NAME:SCALE such as {name}:0.8") from None
        if name in found:
            raise InvalidInput("lora", f"names {quoted(name)} twice: give it one scale")
        found[name] = number
    return found
