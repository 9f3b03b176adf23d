"""Other looks of scenes: what a style makes of one is a scene too, so that it is scored in the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from samples.world.scenes import Scene

OPPOSITES: Final = {
    "red": "cyan", "green": "purple", "blue": "yellow", "yellow": "blue", "purple": "green", "cyan": "red",
    "white": "black", "gray": "gray", "black": "white",
}  # fmt: skip


def negative(scene: Scene) -> Scene:
    """The scene in the colours of a photographic negative."""
    things = tuple(replace(thing, colour=OPPOSITES[thing.colour]) for thing in scene.things)
    return Scene(OPPOSITES[scene.background], things)
