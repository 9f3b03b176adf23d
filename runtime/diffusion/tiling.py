"""Decoding in overlapping tiles, where a whole picture does not fit into memory: from latents to tiles, from tiles to
the picture.

Neighbouring tiles share a quarter of their edge, over which one fades linearly into the other (as in diffusers' tiled
decoding). A decoder that normalizes over the whole picture (GroupNorm; Wu and He 2018, arXiv 1803.08494) sees only a
tile at a time, so the result is near the untiled one, not equal to it; the larger the tiles, the nearer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

OVERLAP: Final = 4
"""Neighbouring tiles overlap by this fraction (one over it) of a tile's edge."""
LEAST: Final = 16
"""Edge of the smallest tile, in latents: smaller ones see too little of the picture to be alike (decision 15 has the
figures).
"""
Pixels = NDArray[np.float32]


def tile_shape(height: int, width: int, most: float, multiple: int = 1) -> tuple[int, int]:
    """Height and width of tiles of at most `most` latents, as square and as large as they can be; the whole where it
    fits.

    Both are multiples of `multiple`, as `height` and `width` are. Tiles are never smaller than `LEAST` or the whole's
    edge.
    """
    if height * width <= most:
        return height, width

    def cut(edge: float, whole: int) -> int:
        return min(whole, max(math.ceil(LEAST / multiple), int(edge) // multiple) * multiple)

    short = cut(math.sqrt(most), min(height, width))
    long = cut(most / short, max(height, width))
    return (short, long) if height <= width else (long, short)


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along an edge, evenly spread: the first at 0, the last ends at the end."""
    if tile >= length:
        return [0]
    count = 1 + math.ceil((length - tile) / max(1, tile - tile // OVERLAP))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def places(height: int, width: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every tile, in reading order."""
    for top in starts(height, tile[0]):
        for left in starts(width, tile[1]):
            yield slice(top, top + min(tile[0], height)), slice(left, left + min(tile[1], width))


class Mosaic:
    """A picture [channels, height, width] made of tiles. `scale` is the edge of a latent in pixels."""

    def __init__(self, height: int, width: int, scale: int) -> None:
        self._size = height, width
        self._scale = scale
        self._sum: Pixels | None = None
        self._weights = np.zeros((height * scale, width * scale), np.float32)

    def add(self, rows: slice, columns: slice, pixels: Pixels) -> None:
        """Add the pixels [channels, height, width] of the tile with these rows and columns of latents."""
        if self._sum is None:
            self._sum = np.zeros((len(pixels), *self._weights.shape), np.float32)
        weights = np.outer(
            *(_fade(part, whole, self._scale) for part, whole in zip((rows, columns), self._size, strict=True))
        )
        down, across = (slice(part.start * self._scale, part.stop * self._scale) for part in (rows, columns))
        self._sum[:, down, across] += pixels * weights
        self._weights[down, across] += weights

    def picture(self) -> Pixels:
        """The whole picture: each pixel is the mean over its tiles, weighted by its distance from their borders."""
        assert self._sum is not None and self._weights.all(), "every latent is in a tile"
        return np.asarray(self._sum / self._weights, np.float32)


def _fade(part: slice, whole: int, scale: int) -> Pixels:
    """Weights along an edge of a tile: rising from a border that has a neighbour, 1 elsewhere."""
    length = part.stop - part.start
    weights = np.ones(length * scale, np.float32)
    overlap = max(1, length // OVERLAP) * scale
    ramp = ((np.arange(overlap) + 0.5) / overlap).astype(np.float32)
    if part.start > 0:
        weights[:overlap] *= ramp
    if part.stop < whole:
        weights[-overlap:] *= ramp[::-1]
    return weights
