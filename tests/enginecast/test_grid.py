"""A grid of a real model, cell by cell and as one request: each cell is what the same request draws alone."""

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
        grid = {"x": "steps=1,2", "y": {"field": "sampler", "values": list(samplers)}, "cells": True}
        at_once = model.generate("a red circle", seed=3, guidance_scale=3.0, scripts={"xyz_grid": grid})
    assert len({cell.tobytes() for cell in found.cells}) == 4
    for one, expected in zip(at_once.images, (found.image, *found.cells), strict=True):
        np.testing.assert_array_equal(one.image, expected)
    for cell, picture in zip(found.cells, alone, strict=True):
        np.testing.assert_array_equal(cell, picture)
