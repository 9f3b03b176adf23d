"""General questions: seeded, about photographs and drawn pictures in turn."""

from __future__ import annotations

from itertools import islice

import numpy as np

from calibration.requests.pictures import SIZE
from calibration.requests.tasks.chat import QUESTIONS, TASK
from runtime.tasks.chat import ChatRequest


def text(request: ChatRequest) -> str:
    return str(request.messages[0].content[1])


def picture(request: ChatRequest) -> np.ndarray:
    (found,) = request.images
    assert isinstance(found, np.ndarray)
    return found


def test_questions_are_seeded() -> None:
    one, again, other = (list(islice(TASK.general(seed), 8)) for seed in (0, 0, 1))
    assert list(map(text, one)) == list(map(text, again)) != list(map(text, other))
    assert all(np.array_equal(picture(a), picture(b)) for a, b in zip(one, again, strict=True))


def test_photographs_and_drawn_pictures_alternate() -> None:
    some = list(islice(TASK.general(0), 8))
    assert all(picture(request).shape == (SIZE[1], SIZE[0], 3) for request in some[1::2])
    assert all(picture(request).shape[:2] != (SIZE[1], SIZE[0]) for request in some[::2])


def test_every_question_meets_both_kinds_of_pictures() -> None:
    some = [text(request) for request in islice(TASK.general(0), 2 * len(QUESTIONS))]
    assert set(some[::2]) == set(some[1::2]) == set(QUESTIONS)
