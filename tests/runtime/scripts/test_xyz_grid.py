"""The grid as a script of one request: the same page as cell by cell, over gRPC and in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import enginecast
from enginecast import InvalidInput
from runtime.grid.picture import grid_picture
from runtime.grid.plan import GridPlan
from runtime.tasks.image import ImageRequest
from serving.dialects.python.model import Model
from tests.fakes.painting import Painter, painted, painting

AXES: dict[str, Any] = {"x": "steps=1-3", "y": {"field": "sampler", "values": ["euler", "ddim"]}}
PLAN = GridPlan.of(ImageRequest("a", seed=4), {"x": ("steps", "1-3"), "y": ("sampler", "euler,ddim")})


def test_one_labelled_picture_comes_back(tmp_path: Path) -> None:
    cells = [painted(cell) for cell in PLAN.cells]
    page = grid_picture(PLAN, cells)
    with painting(tmp_path / "bundles") as (server, painter), enginecast.Client(server.address, "draw") as client:
        drawn = client.generate("a", seed=4, scripts={"xyz_grid": AXES})
        assert len(drawn.images) == 1 and len(painter.requests) == 6
        np.testing.assert_array_equal(drawn.image, page)
        assert drawn.done.notes == (
            "Script: X/Y/Z plot, X Type: steps, X Values: 1,2,3, Y Type: sampler, Y Values: euler,ddim",
        )
        drawn = client.generate("a", seed=4, scripts={"xyz_grid": {**AXES, "cells": True}})
    assert [(one.index, one.seed) for one in drawn.images] == [(index, 4) for index in range(7)]
    for one, expected in zip(drawn.images, [page, *cells], strict=True):
        np.testing.assert_array_equal(one.image, expected)


def test_steps_are_counted_over_all_cells() -> None:
    with Model(Painter()) as model:
        events = list(model.generate_stream("a", scripts={"xyz_grid": AXES}))
    progress = [event for event in events if isinstance(event, enginecast.Progress)]
    assert [(one.step, one.total) for one in progress] == [(step, 12) for step in range(1, 13)]


@pytest.mark.parametrize(
    ("options", "axes", "message"),
    [
        ({}, {}, "x: is missing: a grid has one axis at least"),
        ({}, {"x": "steps"}, "scripts.xyz_grid.x: is 'steps', expected FIELD=VALUES"),
        ({}, {"x": {"field": "steps"}}, "scripts.xyz_grid.x.values: Field required"),
        ({}, {"x": {"field": "image", "values": ["/etc/passwd"]}}, "x: 'image' cannot be on an axis"),
        ({}, {"x": {"field": "sampler", "values": [3]}}, "x: has a value of sampler that is 3, expected a text"),
        ({}, {"w": "steps=1"}, "scripts.xyz_grid: has no argument 'w'"),
        ({"images": 2}, AXES, "images: is 2: each cell of a grid is one picture"),
        ({}, {"x": "steps=1000", "y": "seed=1-5"}, "steps: of all cells are 5,000, expected at most 4,000"),
        ({}, {"x": "steps=5,0"}, "steps: is 0"),
    ],
)
def test_mistakes_end_before_any_work(options: dict[str, Any], axes: dict[str, Any], message: str) -> None:
    painter = Painter()
    with pytest.raises(InvalidInput, match=message), Model(painter) as model:
        model.generate("a", scripts={"xyz_grid": axes}, **options)
    assert not painter.requests and not painter.calls


def test_a_grid_of_wildcards_names_what_cells_were_drawn_from(tmp_path: Path) -> None:
    from runtime.script import Folders
    from runtime.scripting import Scripts

    (tmp_path / "colour.txt").write_text("red\nblue\n")
    with Model(Painter(), installed=Scripts(Folders(wildcards=tmp_path))) as model:
        axes = {"x": "seed=1-6", "cells": True}
        drawn = model.generate("__colour__", scripts={"xyz_grid": axes, "wildcards": {}})
        alone = [model.generate("__colour__", seed=seed, scripts={"wildcards": {}}).images[0] for seed in range(1, 7)]
    assert {one.prompt for one in drawn.images[1:]} == {"red", "blue"}
    for cell, one in zip(drawn.images[1:], alone, strict=True):
        assert (cell.prompt, cell.seed) == (one.prompt, one.seed)
        np.testing.assert_array_equal(cell.image, one.image)
