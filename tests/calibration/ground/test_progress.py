"""Loops that report where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from calibration.ground.progress import Position, at, each, followed, listening, phase, reached, reused
from runtime.pipeline import Event, Progress
from runtime.tasks.chat import TextDelta


@pytest.fixture
def told() -> Iterator[list[Position]]:
    found: list[Position] = []
    with listening(found.append):
        yield found


def test_loops_within_loops(told: list[Position]) -> None:
    for _ in each("request", "ab"):
        for _ in each("call", [1, 2]):
            pass
    assert [(one.share, one.text) for one in told] == [
        (0.0, "request 1 of 2"),
        (0.0, "request 1 of 2, call 1 of 2"),
        (0.25, "request 1 of 2, call 2 of 2"),
        (0.5, "request 2 of 2"),
        (0.5, "request 2 of 2, call 1 of 2"),
        (0.75, "request 2 of 2, call 2 of 2"),
    ]


def test_phases(told: list[Position]) -> None:
    with phase(0.2, 0.6):
        reached(0.5, "half")
        with at("tensor", 3, 4):
            pass
    assert [one.share for one in told] == pytest.approx([0.2, 0.4, 0.4]) and told[-1].text == "tensor 3 of 4"


def test_a_pipeline_s_events(told: list[Position]) -> None:
    events: list[Event] = [Progress(1, 4), TextDelta("a"), Progress(2, 4)]
    assert list(followed(iter(events), tokens=8)) == events
    assert [(one.share, one.text) for one in told] == [
        (0.25, "step 1 of 4"),
        (0.125, "token 1 of at most 8"),
        (0.5, "step 2 of 4"),
    ]


def test_work_that_was_done_before_is_free(told: list[Position]) -> None:
    for number in each("request", range(4)):
        if number < 3:
            reused()
    assert told[-1].share == told[-1].free == 0.75


def test_a_broken_loop_leaves_no_place(told: list[Position]) -> None:
    for _ in each("request", "ab"):
        break
    with pytest.raises(KeyError), at("call", 1, 2):
        raise KeyError
    reached(1.0, "end")
    assert told[-1].text == "end"


def test_nobody_listens() -> None:
    assert list(each("call", "ab")) == ["a", "b"] and list(each("call", iter("ab"), 2)) == ["a", "b"]
    reused()
