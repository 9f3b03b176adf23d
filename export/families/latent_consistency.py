"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378): Stable Diffusion, distilled to draw in few steps. The
UNet takes an embedding of the guidance scale.

Those of XL, and others with such a UNet in a pipeline of Stable Diffusion, are of that pipeline's family.
"""

from __future__ import annotations

from typing import Any, Final

from export.checkpoint.source import Source
from export.families import stable_diffusion as base
from export.family import Family
from runtime.diffusion.defaults import ImageDefaults

USUAL: Final = ImageDefaults(steps=4, guidance_scale=8.5)
"""As diffusers' LatentConsistencyModelPipeline has it."""


def config(source: Source) -> dict[str, Any]:
    grid = base.Grid.of(source, *base.configs(source, "unet", "vae"))
    defaults = ImageDefaults.read(source.root, USUAL)
    return base.settings(source, grid, base.schedule(source), defaults, steps_in_strength=True)


FAMILY = Family(
    "latent-consistency",
    "diffusion",
    ("LatentConsistencyModelPipeline",),
    base.parts,
    config,
    base.assets,
    lambda source: base.notes(source, base.schedule(source)),
    base.ADDITIONS,
)
