"""The questions have one right answer each, and what is held out stays out of training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from samples.world import questions
from samples.world.questions import (
    KINDS,
    WORDS,
    Case,
    Question,
    Word,
    draw_scene,
    draw_word,
    render_word,
    scene_questions,
    word_questions,
)
from samples.world.scenes import Scene, Thing, held_out

PAIR = Scene("white", (Thing("large", "red", "circle", "left"), Thing("small", "blue", "circle", "right")))
CORNERS = Scene("black", (Thing("small", "red", "square", "top left"), Thing("small", "red", "circle", "bottom left")))


def asked(scene: Scene) -> dict[str, set[str]]:
    """The answers of every question about a scene."""
    answers: dict[str, set[str]] = {}
    for question in scene_questions(scene, np.random.default_rng(0)):
        answers.setdefault(question.text, set()).add(question.answer)
    return answers


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return questions.test_questions(80)


def test_a_pair_is_asked_about_in_every_way() -> None:
    answers = asked(PAIR)
    assert answers["where is the red circle?"] == {"left"}
    assert answers["what color is the large circle?"] == {"red"}
    assert answers["what shape is the blue thing?"] == {"circle"}
    assert answers["what size is the blue circle?"] == {"small"}
    assert answers["what color is the shape on the right?"] == {"blue"}
    assert answers["how many shapes are there?"] == {"2"}
    assert answers["how many squares are there?"] == {"0"}
    assert answers["which is further left, the blue circle or the red circle?"] == {"the red circle"}
    assert answers["describe the picture."] == {
        "a large red circle on the left and a small blue circle on the right on a white background"
    }


def test_what_would_be_ambiguous_is_not_asked() -> None:
    assert "what color is the circle?" not in asked(PAIR)
    assert "what shape is the red thing?" not in asked(CORNERS)
    assert not [question for question in asked(CORNERS) if "further left" in question]


@pytest.mark.parametrize("seed", range(20))
def test_every_question_has_one_answer(seed: int) -> None:
    scene = draw_scene(np.random.default_rng(seed))
    assert all(len(answers) == 1 for answers in asked(scene).values())
    assert len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things)


@pytest.mark.parametrize("held", [False, True])
def test_scenes_and_words_are_held_out_as_asked(held: bool) -> None:
    rng = np.random.default_rng(1)
    assert {held_out(draw_scene(rng, held).caption) for _ in range(50)} == {held}
    assert {held_out(draw_word(rng, held).text) for _ in range(50)} == {held}


def test_words_can_be_written_and_enough_are_held_out() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert {len(word) for word in WORDS} == {3, 4}
    assert sum(map(held_out, WORDS)) >= 30


@pytest.mark.parametrize(("text", "columns"), [("wow", (16, 112)), ("mama", (0, 128))])
def test_a_word_is_written_across_the_middle(text: str, columns: tuple[int, int]) -> None:
    word = Word(text, "black", "white")
    picture = render_word(word, np.random.default_rng(0))
    assert picture.shape == (128, 128, 3)
    rows, across = np.nonzero((picture != picture[0, 0]).any(-1))
    assert 40 < rows.min() < rows.max() < 88
    assert columns[0] - 3 <= across.min() < columns[0] + 12
    assert columns[1] - 12 < across.max() < columns[1] + 3
    assert Question("read", "what does the word say?", text) in word_questions(word)


def test_test_questions_ask_every_kind_as_often(cases: list[Case]) -> None:
    assert Counter(case.kind for case in cases) == dict.fromkeys(KINDS, 10)
    assert all(case.picture.shape == (128, 128, 3) and case.picture.dtype == np.uint8 for case in cases)
    assert all(held_out(case.answer) for case in cases if case.kind in ("caption", "read"))


def test_test_questions_repeat_for_a_seed(cases: list[Case]) -> None:
    again = questions.test_questions(80)
    assert all(np.array_equal(a.picture, b.picture) and a.answer == b.answer for a, b in zip(cases, again, strict=True))
    other = questions.test_questions(80, seed=1)
    assert [case.question for case in other] != [case.question for case in cases]
