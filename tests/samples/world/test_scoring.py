from dataclasses import replace
from itertools import islice

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from samples.world.scenes import Scene, Thing, picture_scenes, render
from samples.world.scoring import UNCLEAR, read_picture, score_answer, score_picture

LEFT = Thing("large", "red", "circle", "left")
RIGHT = Thing("small", "blue", "square", "right")
SCENE = Scene("white", (LEFT, RIGHT))


def drawn(scene: Scene, seed: int = 0) -> NDArray[np.uint8]:
    return render(scene, np.random.default_rng(seed))


@pytest.mark.parametrize("edge", [128, 256])
def test_reads_what_was_drawn(edge: int) -> None:
    rng = np.random.default_rng(edge)
    scenes = list(islice(picture_scenes(), edge % 17, None, 17 if edge == 128 else 170))
    right = [bool(score_picture(render(scene, rng, edge), scene)) for scene in scenes]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_bears_soft_edges_and_a_little_noise(sigma: float) -> None:
    rng = np.random.default_rng(1)
    right = []
    for scene in islice(picture_scenes(), 3, None, 31):
        soft = cv2.GaussianBlur(render(scene, rng), (0, 0), sigma) + rng.normal(0, 4, (128, 128, 3))
        right.append(bool(score_picture(soft.clip(0, 255).astype(np.uint8), scene)))
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize("attribute", ["size", "colour", "shape"])
def test_names_the_wrong_attribute(attribute: str) -> None:
    other = {"size": "small", "colour": "green", "shape": "triangle"}[attribute]
    score = score_picture(drawn(SCENE), Scene("white", (replace(LEFT, **{attribute: other}), RIGHT)))
    assert score.wrong == (attribute,)
    assert not score


def test_names_background_missing_and_extra_things() -> None:
    assert score_picture(drawn(SCENE), replace(SCENE, background="gray")).wrong == ("background",)
    assert score_picture(drawn(SCENE), Scene("white", (LEFT,))).wrong == ("extra",)
    assert score_picture(drawn(Scene("white", (LEFT,))), SCENE).wrong == ("missing",)
    moved = Scene("white", (replace(LEFT, place="top left"), RIGHT))
    assert score_picture(drawn(moved), SCENE).wrong == ("missing", "extra")


def test_swapped_things_are_wrong() -> None:
    swapped = Scene("white", (replace(RIGHT, place="left"), replace(LEFT, place="right")))
    assert score_picture(drawn(swapped), SCENE).wrong == ("size", "colour", "shape") * 2


def test_off_its_place_or_between_sizes_is_unclear() -> None:
    picture = np.full((128, 128, 3), 248, np.uint8)
    cv2.circle(picture, (52, 64), 20, (225, 30, 35), -1)
    assert read_picture(picture).things == (Thing(UNCLEAR, "red", "circle", UNCLEAR),)


@pytest.mark.parametrize("colour", [(150, 90, 40), (128, 128, 128), (255, 255, 255)])
def test_unnamed_colours_are_not_taken_for_named_ones(colour: tuple[int, int, int]) -> None:
    picture = np.full((128, 128, 3), 12, np.uint8)
    cv2.circle(picture, (64, 64), 27, colour, -1)
    scene = Scene("black", (Thing("large", "red", "circle", "center"),))
    assert not score_picture(picture, scene)


def test_specks_and_streaks_are_wrong() -> None:
    picture = drawn(SCENE)
    picture[100:106, 30:36] = (25, 165, 60)
    assert "extra" in score_picture(picture, SCENE).wrong
    picture = drawn(SCENE)
    picture[100, :] = (25, 165, 60)
    assert score_picture(picture, SCENE).wrong == ("background",)


def test_an_odd_ground_is_unclear() -> None:
    half = drawn(SCENE)
    half[:, :64][(half[:, :64] > 240).all(axis=2)] = 128
    assert not score_picture(half, SCENE)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert not score_picture(noise, SCENE)


def test_touching_things_of_one_colour_are_two() -> None:
    scene = Scene("white", (Thing("large", "red", "triangle", "left"), Thing("large", "red", "square", "right")))
    right = [bool(score_picture(drawn(scene, seed), scene)) for seed in range(50)]
    assert np.mean(right) >= 0.98


def test_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"expected a square RGB picture.*float64 \[128, 128\]"):
        read_picture(np.zeros((128, 128)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Blue", True),
        (" blue. ", True),
        ("blue", True),
        ("BLUE .", True),
        ("blue..", False),
        ("light blue", False),
        ("", False),
    ],
)
def test_answers_match_but_for_case_blanks_and_period(answer: str, right: bool) -> None:
    assert score_answer(answer, "blue") is right
