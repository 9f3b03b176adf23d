"""Spreads of repeated measurements, and turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.timing import LEAST, Spread, seconds, turns


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(repetitions=1, minimum=3, lower=3, median=3, upper=3, maximum=3)
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(
        repetitions=5, minimum=1, lower=2, median=3, upper=4, maximum=5
    )


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=9))
def test_a_spread_is_ordered(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.repetitions == len(values) and spread.minimum == min(values) and spread.maximum == max(values)


def test_a_spread_of_no_numbers_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected minimum <= lower"):
        Spread.of([float("nan")])


def test_turns() -> None:
    order: list[str] = []
    done: list[int] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert turns([lambda: measure("a"), lambda: measure("b")], 2, done.append) == [[3, 5], [4, 6]]
    assert order == ["a", "b"] * 3 and done == [0, 1, 2]


def test_turns_within_a_budget() -> None:
    assert len(turns([lambda: None], 100, budget=0)[0]) == LEAST
    assert len(turns([lambda: None], 2, budget=0)[0]) == 2
    assert len(turns([lambda: None], 5, budget=60)[0]) == 5


def test_seconds() -> None:
    assert 0 <= seconds(lambda: None) < 1
