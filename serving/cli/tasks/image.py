"""`enginecast generate`: pictures from a prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from runtime.errors import InvalidInput, quoted
from runtime.limits import IMAGE_SEED
from serving.cli.options import UINT32, ModelOptions, with_model_options

if TYPE_CHECKING:
    from serving.dialects.python.requests import Control

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
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PICTURE[:SCALE][@START-END]",
            help="Picture file for a control network of the bundle, how much it counts (1), and in which shares of the "
            "steps (0-1). Repeat for several.",
        ),
    ] = None,
    prompt_weights: PromptWeights = False,
) -> None:
    """Draw a picture from a prompt."""
    from serving.cli import terminal
    from serving.dialects.python.requests import ImageOptions, image_request

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
        controls=[parse_control(text) for text in control or ()],
        prompt_weights=prompt_weights or None,
    )
    request = image_request(terminal.unicode("prompt", prompt), given)
    with where.session(request) as session:
        for path in terminal.draw(session.draw(request), out, where.verbose):
            print(path)


COMMAND: Final = generate
