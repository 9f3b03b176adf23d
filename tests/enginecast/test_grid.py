"""A grid of a real model: each cell is the picture that the same request draws alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import enginecast


def test_each_cell_is_drawn_as_alone(diffusion_bundle: Path, tmp_path: Path) -> None:
    samplers, steps = ("euler_ancestral", "ddim"), (1, 2)
    with enginecast.load(diffusion_bundle) as model:
        found = model.grid(
            "a red circle",
            x=("steps", steps),
            y=("sampler", samplers),
            seed=3,
            guidance_scale=3.0,
            folder=tmp_path / "c",
        )
        alone = [
            model.generate("a red circle", steps=count, sampler=sampler, seed=3, guidance_scale=3.0).image
            for sampler in samplers
            for count in steps
        ]
    assert len({cell.tobytes() for cell in found.cells}) == 4
    for cell, picture in zip(found.cells, alone, strict=True):
        np.testing.assert_array_equal(cell, picture)
