from itertools import islice

import numpy as np
import pytest

from samples.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    held_out,
    picture_scenes,
    render,
)
from samples.world.scenes import test_prompts as held_out_scenes  # under its own name pytest would run it

RED = Thing("large", "red", "circle", "left")
BLUE = Thing("small", "blue", "square", "right")


def test_every_scene_has_its_own_caption() -> None:
    scenes = list(picture_scenes())
    kinds = len(SIZES) * len(COLOURS) * len(SHAPES)
    assert len(scenes) == len(BACKGROUNDS) * kinds * (len(POSITIONS) + kinds - 1)
    assert len({scene.caption for scene in scenes}) == len(scenes)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (
            Scene("white", (RED, BLUE)),
            "a large red circle on the left and a small blue square on the right on a white background",
        ),
        (
            Scene("black", (Thing("small", "cyan", "triangle", "center"),)),
            "a small cyan triangle in the center on a black background",
        ),
        (
            Scene("gray", (Thing("large", "green", "square", "top left"),)),
            "a large green square at the top left on a gray background",
        ),
    ],
)
def test_captions_read_well(scene: Scene, caption: str) -> None:
    assert scene.caption == caption


def test_a_fifth_is_held_out_and_stays_so() -> None:
    kept = [held_out(scene.caption) for scene in picture_scenes()]
    assert 0.17 < np.mean(kept) < 0.23
    assert kept == [held_out(scene.caption) for scene in picture_scenes()]


def test_test_prompts_are_held_out_distinct_and_repeatable() -> None:
    scenes = held_out_scenes()
    assert len(scenes) == len({scene.caption for scene in scenes}) == 500
    assert all(held_out(scene.caption) for scene in scenes)
    assert scenes == held_out_scenes()
    assert scenes != held_out_scenes(seed=1)
    singles = sum(len(scene.things) == 1 for scene in scenes)
    assert 90 <= singles <= 500 // 3


def test_render_is_seeded_and_drawn_to_scale() -> None:
    scene = Scene("black", (RED,))
    picture = render(scene, np.random.default_rng(3))
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, render(scene, np.random.default_rng(3)))
    assert not np.array_equal(picture, render(scene, np.random.default_rng(4)))
    drawn = (picture == COLOURS["red"]).all(axis=2).mean()
    assert drawn == pytest.approx(np.pi * SIZES["large"] ** 2, rel=0.15)
    larger = (render(scene, np.random.default_rng(3), edge=256) == COLOURS["red"]).all(axis=2).mean()
    assert larger == pytest.approx(drawn, rel=0.05)


@pytest.mark.parametrize("scene", list(islice(picture_scenes(), 0, None, 700)), ids=lambda scene: scene.caption)
def test_render_uses_the_named_colours(scene: Scene) -> None:
    picture = render(scene, np.random.default_rng(0), jitter=0)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert BACKGROUNDS[scene.background] in colours
    assert {COLOURS[thing.colour] for thing in scene.things} <= colours
