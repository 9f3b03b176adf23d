from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.diffusion.tiling import LEAST, OVERLAP, Mosaic, places, starts, tile_shape

edges = st.integers(1, 40)


@given(height=edges, width=edges, most=st.integers(1, 2000), multiple=st.integers(1, 8))
def test_tiles_fit_and_are_never_tiny(height: int, width: int, most: int, multiple: int) -> None:
    height, width = height * multiple, width * multiple
    tile = tile_shape(height, width, most, multiple)
    if height * width <= most:
        assert tile == (height, width)
    least = math.ceil(LEAST / multiple) * multiple
    assert all(
        edge % multiple == 0 and min(least, whole) <= edge <= whole
        for edge, whole in zip(tile, (height, width), strict=True)
    )
    assert tile[0] * tile[1] <= most or any(edge <= least for edge in tile)


@given(length=edges, tile=edges)
def test_tiles_cover_an_edge_and_overlap(length: int, tile: int) -> None:
    found = starts(length, tile)
    assert found[0] == 0 and found[-1] + min(tile, length) == length
    assert all(0 < after - before <= max(1, tile - tile // OVERLAP) for before, after in itertools.pairwise(found))


@settings(max_examples=40)
@given(height=edges, width=edges, tile=st.tuples(edges, edges), scale=st.integers(1, 4), seed=st.integers(0, 99))
def test_tiles_of_a_picture_make_that_picture(
    height: int, width: int, tile: tuple[int, int], scale: int, seed: int
) -> None:
    """Where a tile's pixels depend on nothing outside of it, fading from one into the other changes nothing."""
    picture = np.random.default_rng(seed).standard_normal((3, height * scale, width * scale), np.float32)
    mosaic = Mosaic(height, width, scale)
    for rows, columns in places(height, width, tile):
        down, across = (slice(part.start * scale, part.stop * scale) for part in (rows, columns))
        mosaic.add(rows, columns, picture[:, down, across])
    np.testing.assert_allclose(mosaic.picture(), picture, atol=1e-5)


def test_neighbours_fade_into_each_other() -> None:
    """Between a black and a white tile lies a ramp, not an edge."""
    mosaic = Mosaic(8, 14, 2)
    for (rows, columns), value in zip(places(8, 14, (8, 8)), (0.0, 1.0), strict=True):
        mosaic.add(rows, columns, np.full((1, 16, 16), value, np.float32))
    row = mosaic.picture()[0, 0]
    assert row[:12].max() == 0 and row[16:].min() == 1
    assert (np.diff(row[11:17]) > 0).all() and np.diff(row).max() < 0.5
