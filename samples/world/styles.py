"""Other looks of scenes: what a style makes of one is a scene too, so that it is scored in the same way."""

from __future__ import annotations

from dataclasses import replace

from samples.world.scenes import Scene


def night(scene: Scene) -> Scene:
    """The scene on a black background, whatever its own is."""
    return replace(scene, background="black")
