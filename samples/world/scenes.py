"""Scenes of coloured shapes: the world that both sample models learn and are scored in.

A scene is a background and a few things at named places. It can be drawn (`render`), described (`caption`) and scored
(`samples.world.scoring`), so a program can tell whether a picture or an answer about it is right. Everything here is
pure and seeded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (225, 30, 35),
    "green": (25, 165, 60),
    "blue": (35, 65, 225),
    "yellow": (245, 215, 30),
    "purple": (170, 45, 195),
    "cyan": (40, 205, 215),
}
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "black": (12, 12, 12),
}
SHAPES: Final = ("circle", "square", "triangle")
SIZES: Final[dict[str, float]] = {"small": 0.115, "large": 0.215}
"""Half extent of a thing as a share of the picture's edge."""
POSITIONS: Final[dict[str, tuple[float, float]]] = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
    "center": (0.5, 0.5),
}
SIDES: Final[dict[str, tuple[float, float]]] = {"left": (0.27, 0.5), "right": (0.73, 0.5)}
PLACES: Final = POSITIONS | SIDES
JITTER: Final = 0.03
"""A thing's centre is drawn this far from its place at most, as a share of the edge."""


@dataclass(frozen=True, order=True)
class Thing:
    """A shape of one colour and size at a named place."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and the things on it."""

    background: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """The prompt that asks for this scene."""
        where = (
            {place: f"at the {place}" for place in POSITIONS}
            | {"center": "in the center"}
            | {side: f"on the {side}" for side in SIDES}
        )
        things = " and ".join(f"{thing.phrase} {where[thing.place]}" for thing in self.things)
        return f"{things} on a {self.background} background"


def held_out(text: str) -> bool:
    """Whether a caption or word belongs to the fifth that no training ever sees: decided by its hash, so the split
    needs no list.
    """
    return hashlib.sha256(text.encode()).digest()[0] < 51


def picture_scenes() -> Iterator[Scene]:
    """All scenes a prompt can ask for: one thing at a position, or one on the left and another on the right."""
    kinds = list(product(SIZES, COLOURS, SHAPES))
    for background, kind, position in product(BACKGROUNDS, kinds, POSITIONS):
        yield Scene(background, (Thing(*kind, position),))
    for background, left, right in product(BACKGROUNDS, kinds, kinds):
        if left != right:
            yield Scene(background, (Thing(*left, "left"), Thing(*right, "right")))


def test_prompts(count: int = 500, seed: int = 0, held: bool = True) -> list[Scene]:
    """Held-out scenes to score a model with, or others: a third with one thing, the rest with two, no scene twice."""
    rng = np.random.default_rng(seed)
    scenes = [scene for scene in picture_scenes() if held_out(scene.caption) == held]
    single = [scene for scene in scenes if len(scene.things) == 1]
    pairs = [scene for scene in scenes if len(scene.things) == 2]
    singles = min(len(single), count // 3)
    chosen = [single[i] for i in rng.permutation(len(single))[:singles]]
    chosen += [pairs[i] for i in rng.permutation(len(pairs))[: count - singles]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def outline(shape: str, x: float, y: float, radius: float) -> NDArray[np.float32]:
    """Corner points [n, 2] of a square or an upward triangle around (x, y), in pixels."""
    if shape == "square":
        half = radius * 0.9
        corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    else:
        corners = [(0.0, -radius), (radius * 1.05, radius * 0.85), (-radius * 1.05, radius * 0.85)]
    return np.array(corners, np.float32) + np.array((x, y), np.float32)


def render(scene: Scene, rng: np.random.Generator, edge: int = 128, jitter: float = JITTER) -> NDArray[np.uint8]:
    """Draw a scene: uint8 RGB [edge, edge, 3], antialiased, each thing a little off its place and size."""
    bits = 4  # sub-pixel bits of cv2's fixed-point coordinates
    canvas = np.full((edge, edge, 3), BACKGROUNDS[scene.background], np.uint8)
    for thing in scene.things:
        x, y = (np.array(PLACES[thing.place]) + rng.uniform(-jitter, jitter, 2)) * edge
        radius = SIZES[thing.size] * edge * rng.uniform(0.94, 1.06)
        colour = COLOURS[thing.colour]
        if thing.shape == "circle":
            centre = (round((x - 0.5) * 2**bits), round((y - 0.5) * 2**bits))
            cv2.circle(canvas, centre, round(radius * 2**bits), colour, -1, cv2.LINE_AA, bits)
        else:
            points = np.round((outline(thing.shape, x - 0.5, y - 0.5, radius)) * 2**bits).astype(np.int32)
            cv2.fillPoly(canvas, [points], colour, cv2.LINE_AA, bits)
    return canvas
