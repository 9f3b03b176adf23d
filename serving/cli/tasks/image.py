"""`enginecast generate`: pictures from a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from runtime.errors import InvalidInput, quoted
from runtime.limits import IMAGE_SEED
from serving.cli.options import UINT32, ModelOptions, with_model_options

if TYPE_CHECKING:
    from serving.dialects.python.requests import Control, Style

CONTROL: Final = re.compile(
    r"(?P<name>[^=]+)=(?P<image>.+?)(:(?P<scale>\d*\.?\d+))?(@(?P<start>\d*\.?\d+)-(?P<end>\d*\.?\d+))?"
)

PromptWeights = Annotated[
    bool,
    typer.Option(
        "--prompt-weights",
        help="Read (word:1.3) in prompts as a weight, and prompts longer than the text encoder reads at once, as "
        "Automatic1111's web UI does.",
    ),
]


def parse_control(text: str) -> Control:
    """From NAME=PICTURE[:SCALE][@START-END]. Raises InvalidInput, NotFound."""
    from serving.dialects.python.requests import Control

    found = CONTROL.fullmatch(text)
    if found is None:
        raise InvalidInput("control", f"is {quoted(text)}, expected NAME=PICTURE[:SCALE][@START-END]")
    numbers = {name: float(found[name]) for name in ("scale", "start", "end") if found[name] is not None}
    return Control(found["name"], Path(found["image"]), **numbers)


STYLE: Final = re.compile(r"(?P<name>[^=]+)=(?P<image>.+?)(:(?P<scale>\d*\.?\d+))?")


def parse_style(text: str) -> Style:
    """From NAME=PICTURE[:SCALE]. Raises InvalidInput."""
    from serving.dialects.python.requests import Style

    found = STYLE.fullmatch(text)
    if found is None:
        raise InvalidInput("style", f"is {quoted(text)}, expected NAME=PICTURE[:SCALE]")
    return Style(found["name"], Path(found["image"]), float(found["scale"] or 1))


Styles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PICTURE[:SCALE]",
        help="Picture file for an image adapter of the bundle, and how much it counts (1). Repeat for several.",
    ),
]
Controls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PICTURE[:SCALE][@START-END]",
        help="Picture file for a control network of the bundle, how much it counts (1), and in which shares of the "
        "steps (0-1). Repeat for several.",
    ),
]


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


Loras = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[:SCALE]", help="A LoRA of the bundle, and how much of it. Repeat for several."),
]


@with_model_options
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw. May be empty.")],
    out: Annotated[
        Path, typer.Option(help="PNG file to write; of several pictures, NAME-0.png, NAME-1.png and so on.")
    ],
    where: ModelOptions,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Denoising steps.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=IMAGE_SEED.most,
            help="Seed of the noise, of further pictures 1 more each; the same one draws the same picture on the same "
            "engine.",
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler by name, such as euler.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's eta, 0 to 1.")] = None,
    width: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Height in pixels.")] = None,
    images: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Number of pictures.")] = None,
    style: Styles = None,
    control: Controls = None,
    prompt_weights: PromptWeights = False,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Picture file to begin with (image to image), at its own size or resized to --width and --height."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --image is drawn anew, 0 to 1: the share of the steps.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture file of the size of --image: only its white part is drawn anew (inpainting)."),
    ] = None,
    mask_blur: Annotated[
        float | None, typer.Option(help="Softens the mask's border: standard deviation in pixels.")
    ] = None,
    keep_unmasked: Annotated[
        bool | None,
        typer.Option(
            help="What is not drawn is copied from the picture, bit for bit, or as the autoencoder renders it."
        ),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(metavar="LEFT,TOP,RIGHT,BOTTOM", help="Pixels to add to --image and to draw (outpainting)."),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]DIR|NAME",
            help="Bundle that draws the rest, such as the refiner of Stable Diffusion XL; without --bundle, a model of "
            "the server.",
        ),
    ] = None,
    refine_from: Annotated[
        float | None,
        typer.Option(help="Share of the schedule at which --refiner goes on, between 0 and 1. Default: 0.8."),
    ] = None,
    lora: Loras = None,
) -> None:
    """Draw a picture from a prompt."""
    from serving.cli import terminal
    from serving.dialects.python.requests import ImageOptions, going_on, image_request

    terminal.check_output(out)
    given = ImageOptions(
        negative_prompt=None if negative_prompt is None else terminal.unicode("negative_prompt", negative_prompt),
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        seed=seed,
        images=images,
        styles=[parse_style(text) for text in style or ()],
        controls=[parse_control(text) for text in control or ()],
        prompt_weights=prompt_weights or None,
        image=image,
        strength=strength,
        mask=mask,
        mask_blur=mask_blur,
        keep_unmasked=keep_unmasked,
        extend=None if extend is None else _edges(extend),
        denoising_end=_handover(refiner, refine_from),
        loras=scales(lora or []),
    )
    request = image_request(terminal.unicode("prompt", prompt), given)
    stages = [where] if refiner is None else [where, where.of(refiner)]
    for later in stages[1:]:
        later.check(request)
    drawing = None
    for stage in stages:
        request = request if drawing is None else going_on(request, drawing)
        with stage.session(request) as session:
            drawing = terminal.draw(session.draw(request), where.verbose)
    assert drawing is not None, "there is a stage"
    for path in drawing.save(out):
        print(path)


def _handover(refiner: str | None, share: float | None) -> float | None:
    if refiner is None and share is not None:
        raise InvalidInput("refine_from", "says where --refiner goes on: give --refiner, or leave it out")
    return None if refiner is None else REFINED_FROM if share is None else share


def _edges(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise InvalidInput(
            "extend", f"is '{text}', expected LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,128,0"
        ) from None
    return left, top, right, bottom


REFINED_FROM: Final = 0.8
"""Where a refiner goes on, as in the paper (Podell et al. 2023, section 2.5): the last fifth of the noise levels."""
COMMAND: Final = generate
