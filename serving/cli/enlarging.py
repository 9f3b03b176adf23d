"""Options of `generate` and `grid` for a second pass at a larger size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from serving.cli.options import UINT32


@dataclass(frozen=True)
class Enlarging:
    """The second pass, which is made where one of these is given. None is its default."""

    hires_scale: Annotated[
        float | None, typer.Option(help="Draw the picture again, this many times as high and as wide: 1 to 8.")
    ] = None
    hires_width: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Draw it again at this width, in its shape.")
    ] = None
    hires_height: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="At this height; with the width, the rest is cut off.")
    ] = None
    hires_upscaler: Annotated[
        str | None, typer.Option(help="How it is enlarged, such as latent_bicubic or lanczos. Default: latent.")
    ] = None
    hires_steps: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Steps that are taken. Default: as many as before.")
    ] = None
    hires_strength: Annotated[float | None, typer.Option(help="How much is drawn anew, 0 to 1.")] = None
    hires_prompt: Annotated[str | None, typer.Option(help="What to draw then. Default: --prompt.")] = None
    hires_negative_prompt: Annotated[str | None, typer.Option(help="What to keep out then.")] = None
    hires_sampler: Annotated[str | None, typer.Option(help="Sampler by name. Default: that of the first pass.")] = None

    def given(self) -> dict[str, Any]:
        """The option of the request. Raises InvalidInput."""
        from runtime.diffusion.hires import Hires

        given = {
            "scale": self.hires_scale,
            "width": self.hires_width,
            "height": self.hires_height,
            "upscaler": self.hires_upscaler,
            "steps": self.hires_steps,
            "strength": self.hires_strength,
            "prompt": self.hires_prompt,
            "negative_prompt": self.hires_negative_prompt,
            "sampler": self.hires_sampler,
        }
        found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return {"hires": Hires(**found) if found else None}
