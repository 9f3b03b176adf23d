"""The cells of a grid, and the picture of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime import limits
from runtime.errors import InvalidInput
from runtime.grid.picture import grid_picture
from runtime.grid.plan import GridPlan
from runtime.tasks.image import ImageRequest

AXES: dict[str, Any] = {
    "x": ("steps", "10,20,30"), "y": ("sampler", ["euler", "ddim"]), "z": ("guidance_scale", [3, 7])
}  # fmt: skip


def test_each_combination_is_a_cell() -> None:
    plan = GridPlan.of(ImageRequest("a circle", seed=5), AXES)
    found = [(cell.steps, cell.sampler, cell.guidance_scale, cell.seed) for cell in plan.cells]
    expected = [(x, y, z, 5) for z in (3.0, 7.0) for y in ("euler", "ddim") for x in (10, 20, 30)]
    assert plan.shape == (3, 2, 2) and found == expected
    assert plan.facts() == {
        "Script": "X/Y/Z plot", "X Type": "steps", "X Values": "10,20,30", "Y Type": "sampler",
        "Y Values": "euler,ddim", "Z Type": "guidance_scale", "Z Values": "3,7",
    }  # fmt: skip


def test_all_cells_have_one_seed() -> None:
    plan = GridPlan.of(ImageRequest("a"), AXES)
    assert len({cell.seed for cell in plan.cells}) == 1 and plan.cells[0].seed is not None
    seeds = GridPlan.of(ImageRequest("a", seed=1), {"x": ("seed", "7-9"), "y": None})
    assert [cell.seed for cell in seeds.cells] == [7, 8, 9]


@pytest.mark.parametrize(
    ("request_", "axes", "field"),
    [
        (ImageRequest("a"), {}, "x"),
        (ImageRequest("a"), {"w": ("steps", "1")}, "w"),
        (ImageRequest("a", images=2), AXES, "images"),
        (ImageRequest("a", denoising_end=0.5), AXES, "denoising_end"),
        (ImageRequest("a"), {"x": ("steps", "1-11"), "y": ("seed", "1-11")}, "grid"),
        (ImageRequest("a"), {"x": ("steps", "1"), "y": ("steps", "2")}, "x"),
        (ImageRequest("a"), {"x": ("steps", "0")}, "steps"),
    ],
)
def test_what_is_no_grid(request_: ImageRequest, axes: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        assert GridPlan.of(request_, axes).cells
    assert caught.value.field == field


def shades(count: int, height: int = 40, width: int = 60) -> list[Any]:
    """Cells of colours that no letter has: letters are grey."""
    return [np.full((height, width, 3), (10 + i, 200, 40), np.uint8) for i in range(count)]


def test_the_picture_has_every_cell_once_and_whole() -> None:
    plan, cells = GridPlan.of(ImageRequest("a", seed=1), AXES), shades(12)
    page = grid_picture(plan, cells)
    places = []
    for cell in cells:
        rows, columns = np.nonzero((page == cell[0, 0]).all(axis=2))
        top, left = rows.min(), columns.min()
        np.testing.assert_array_equal(page[top : top + 40, left : left + 60], cell)
        assert len(rows) == 40 * 60
        places.append((int(top), int(left)))
    tops, lefts = sorted({top for top, _ in places}), sorted({left for _, left in places})
    expected = [(tops[y], lefts[z * 3 + x]) for z in range(2) for y in range(2) for x in range(3)]
    assert places == expected and len(tops) == 2 and len(lefts) == 6
    dark = (page < 5).all(axis=2)
    assert dark[: tops[0], lefts[0] : lefts[2]].any() and dark[:, : lefts[0]].any(), "there are labels above and beside"


def test_labels_change_nothing_but_their_place() -> None:
    one = GridPlan.of(ImageRequest("a", seed=1), {"x": ("prompt", ["word " * 300, "w" * 3000])})
    page = grid_picture(one, shades(2, 64, 64))
    assert page.shape[1] < 200 and page.shape[0] < 200, "long labels are cut"


def test_cells_of_different_sizes_are_centred() -> None:
    plan = GridPlan.of(ImageRequest("a", seed=1), {"x": ("width", "16,32")})
    small, large = shades(2, 8, 16)[0], shades(2, 24, 32)[1]
    page = grid_picture(plan, [small, large])
    assert (page == small[0, 0]).all(axis=2).sum() == 8 * 16 and (page == large[0, 0]).all(axis=2).sum() == 24 * 32


def test_a_picture_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = GridPlan.of(ImageRequest("a", seed=1), {"x": ("steps", "1-10")})
    cell = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (4000, 4000, 3))
    with pytest.raises(InvalidInput, match=f"grid: has .* pixels, expected at most {limits.PICTURE_PIXELS.most:,}"):
        grid_picture(plan, [cell] * 10)
