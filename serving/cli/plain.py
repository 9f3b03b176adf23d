"""Options of `generate` and `grid` that are plain values of a picture request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from runtime.limits import IMAGE_SEED
from serving.cli.drawing import SIZE, parse_pair
from serving.cli.options import UINT32


@dataclass(frozen=True)
class Plain:
    """Texts and numbers of a picture. None is the model's default."""

    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None
    steps: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Denoising steps.")] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=IMAGE_SEED.most,
            help="Seed of the noise, of further pictures 1 more each; the same one draws the same picture on the same "
            "engine.",
        ),
    ] = None
    sampler: Annotated[str | None, typer.Option(help="Sampler by name, such as euler.")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None
    guidance_start: Annotated[
        float | None,
        typer.Option(help="Guide from this share of the steps on, 0 to 1. Other steps take half the work."),
    ] = None
    guidance_end: Annotated[float | None, typer.Option(help="Guide up to this share of the steps, 0 to 1.")] = None
    forecast: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help='Steps that run the UNet, "every 3 after 2" or "1-3,6,9,12"; in the others its output is forecast. '
            '"stored": those chosen for the bundle.',
        ),
    ] = None
    eta: Annotated[float | None, typer.Option(help="DDIM's eta, 0 to 1.")] = None
    width: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Width in pixels.")] = None
    height: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Height in pixels.")] = None
    variation_seed: Annotated[
        int | None,
        typer.Option(min=0, max=IMAGE_SEED.most, help="Another seed, whose noise is mixed with that of --seed."),
    ] = None
    variation_strength: Annotated[float | None, typer.Option(help="The share of its noise, 0 to 1.")] = None
    noise_size: Annotated[
        str | None,
        typer.Option(
            metavar=SIZE,
            help="Draw the noise for a picture of this size, and put it into the middle: something similar at another "
            "size.",
        ),
    ] = None
    prompt_weights: Annotated[
        bool,
        typer.Option(
            "--prompt-weights",
            help="Read (word:1.3) in prompts as a weight, and prompts longer than the text encoder reads at once, as "
            "Automatic1111's web UI does.",
        ),
    ] = False

    def given(self) -> dict[str, Any]:
        """The options of the request. Raises InvalidInput."""
        from serving.cli import terminal

        negative = None if self.negative_prompt is None else terminal.unicode("negative_prompt", self.negative_prompt)
        size = None if self.noise_size is None else parse_pair("noise_size", self.noise_size)
        return asdict(self) | {
            "negative_prompt": negative,
            "noise_size": size,
            "prompt_weights": self.prompt_weights or None,
        }
