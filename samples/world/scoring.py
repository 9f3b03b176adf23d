"""Tell whether a picture shows the scene asked for, or an answer says what was expected. Knows pixels and words, no
model.

`read_picture` finds what a picture of any model shows: it splits the picture by colour, then compares each blob with
ideal outlines. `score_picture` names every attribute in which that differs from the scene. Scoring is strict: what is
unclear counts as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from samples.world.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, outline

UNCLEAR: Final = "unclear"
"""Stands for an attribute that matches no name well enough."""

_GROUND_TOLERANCE: Final = 45
"""Largest channel difference (of 255) that still counts as background; the nearest pair, purple on gray, differs by 83.
"""
_COLOUR_TOLERANCE: Final = 90.0
"""Largest RGB distance of a thing's median colour from the named one; the nearest two, purple and blue, are 142 apart.
"""
_SPECK: Final = 0.0015
"""Blobs below this share of the picture are no things, but together they may not exceed `_LITTER`. A small triangle
covers 0.022.
"""
_LITTER: Final = 0.003
_PLACE_TOLERANCE: Final = 0.08
"""Largest distance from a place as a share of the edge: a renderer's jitter reaches 0.042, the next place is 0.23 away.
"""
_SIZE_TOLERANCE: Final = 0.22
"""Largest relative difference from a named size: a renderer's reaches 0.06, small and large are 0.61 of a mean apart.
"""
_OVERLAP: Final = 0.8
"""Least intersection over union with the ideal shape; a circle and a square of one area share 0.83, so the best of the
shapes counts.
"""
_WIDEST: Final = 0.53
"""A blob wider than this share of the edge is two things of one colour that touch; the widest thing is 0.48."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """What a picture shows and in which attributes it is wrong; true if in none.

    `wrong` has any of background, missing, extra, size, colour, shape: one for each difference. `placed` is the number
    of things that were drawn where they should be: only of those can size, colour and shape be told.
    """

    found: Scene
    wrong: tuple[str, ...]
    placed: int

    def tells(self, attribute: str) -> bool:
        """Whether the picture says anything of this attribute: nothing can be told of what was not drawn."""
        if attribute in ("size", "colour", "shape"):
            return self.placed > 0
        return attribute != "extra" or bool(self.found.things) or self.found.background != UNCLEAR

    def __bool__(self) -> bool:
        return not self.wrong


def score_answer(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one but for case, outer blanks and a closing period."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def score_picture(picture: NDArray[np.uint8], scene: Scene) -> Score:
    """Compare a picture, uint8 RGB [edge, edge, 3], with the scene it should show."""
    found = read_picture(picture)
    wrong = [] if found.background == scene.background else ["background"]
    left, placed = list(found.things), 0
    for thing in scene.things:
        match = next((other for other in left if other.place == thing.place), None)
        if match is None:
            wrong.append("missing")
            continue
        left.remove(match)
        placed += 1
        wrong += [name for name in ("size", "colour", "shape") if getattr(match, name) != getattr(thing, name)]
    return Score(found, (*wrong, *["extra"] * len(left)), placed)


def read_picture(picture: NDArray[np.uint8]) -> Scene:
    """What a picture, uint8 RGB [edge, edge, 3], shows. Attributes that fit no name are UNCLEAR."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        raise ValueError(
            f"expected a square RGB picture, uint8 [edge, edge, 3]; got {picture.dtype} {list(picture.shape)}"
        )
    edge = len(picture)
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(np.int32)
    ground, named = min(BACKGROUNDS.items(), key=lambda item: float(np.abs(np.median(rim, axis=0) - item[1]).max()))
    foreground: Mask = np.abs(picture.astype(np.int32) - named).max(axis=2) > _GROUND_TOLERANCE
    if foreground.mean() > 0.6:
        return Scene(UNCLEAR, ())
    blobs = _blobs(picture, foreground)
    explained = (
        cv2.dilate(np.any([*blobs, np.zeros_like(foreground)], axis=0).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    )
    if (foreground & ~explained).mean() > _LITTER:
        return Scene(UNCLEAR, tuple(_thing(picture, blob, edge) for blob in blobs))
    return Scene(ground, tuple(_thing(picture, blob, edge) for blob in blobs))


def _blobs(picture: NDArray[np.uint8], foreground: Mask) -> list[Mask]:
    """Connected regions of one colour, leftmost first."""
    palette = np.array(list(COLOURS.values()), np.float32)
    nearest = np.linalg.norm(picture[:, :, None].astype(np.float32) - palette, axis=3).argmin(axis=2)
    blobs: list[Mask] = []
    for colour in range(len(palette)):
        # opening drops the rim of another colour's blob, whose mixture with the ground can look like this colour
        mask = cv2.morphologyEx(
            (foreground & (nearest == colour)).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)
        )
        count, labels = cv2.connectedComponents(mask)
        for label in range(1, count):
            blobs += _split(labels == label)
    return sorted(
        (blob for blob in blobs if blob.mean() >= _SPECK), key=lambda blob: int(np.flatnonzero(blob.any(axis=0))[0])
    )


def _split(blob: Mask) -> list[Mask]:
    """A blob, or its two halves if it is too wide for one thing: cut where it is thinnest near the middle."""
    edge = len(blob)
    if np.ptp(np.flatnonzero(blob.any(axis=0))) < _WIDEST * edge:
        return [blob]
    middle = slice(round(0.4 * edge), round(0.6 * edge))
    cut = middle.start + int(blob[:, middle].sum(axis=0).argmin())
    columns = np.arange(edge)
    return [blob & (columns < cut), blob & (columns >= cut)]


def _thing(picture: NDArray[np.uint8], blob: Mask, edge: int) -> Thing:
    """Name a blob's attributes."""
    median = np.median(picture[blob], axis=0)
    colour, distance = min(
        ((name, float(np.linalg.norm(median - rgb))) for name, rgb in COLOURS.items()), key=lambda item: item[1]
    )
    ideals = {shape: _ideal(blob, shape) for shape in SHAPES}
    shape, (overlap, x, y, radius) = max(ideals.items(), key=lambda item: item[1][0])
    size, misfit = min(
        ((name, abs(radius / edge / share - 1)) for name, share in SIZES.items()), key=lambda item: item[1]
    )
    place, away = min(
        ((name, float(np.hypot(x / edge - px, y / edge - py))) for name, (px, py) in PLACES.items()),
        key=lambda item: item[1],
    )
    return Thing(
        size if misfit <= _SIZE_TOLERANCE else UNCLEAR,
        colour if distance <= _COLOUR_TOLERANCE else UNCLEAR,
        shape if overlap >= _OVERLAP else UNCLEAR,
        place if away <= _PLACE_TOLERANCE else UNCLEAR,
    )


def _ideal(blob: Mask, shape: str) -> tuple[float, float, float, float]:
    """The ideal shape with the blob's area and centre of mass: how much they share (IoU), its middle x, y and its
    radius, in pixels.
    """
    rows, columns = np.nonzero(blob)
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    unit = float(np.pi) if shape == "circle" else float(cv2.contourArea(outline(shape, 0, 0, 1)))
    radius = float(np.sqrt(blob.sum() / unit))
    if shape == "triangle":
        y -= float(outline(shape, 0, 0, radius)[:, 1].mean())  # its mass lies below the middle it is drawn from
    canvas = np.zeros(blob.shape, np.uint8)
    bits = 4  # sub-pixel bits of cv2's fixed-point coordinates
    if shape == "circle":
        cv2.circle(
            canvas, (round((x - 0.5) * 2**bits), round((y - 0.5) * 2**bits)), round(radius * 2**bits), 1, -1, shift=bits
        )
    else:
        cv2.fillPoly(
            canvas, [np.round(outline(shape, x - 0.5, y - 0.5, radius) * 2**bits).astype(np.int32)], 1, shift=bits
        )
    ideal = canvas > 0
    return float((ideal & blob).sum() / (ideal | blob).sum()), x, y, radius
