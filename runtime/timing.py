"""Measures times in turns, with their spread. Independent of models and engines."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from pydantic import Field, model_validator

from runtime.bundle.manifest import Frozen

T = TypeVar("T")
LEAST: Final = 3
"""The fewest turns for a rough median and quartiles."""


class Spread(Frozen):
    """Median, quartiles and extremes of repeated measurements in one unit."""

    repetitions: int = Field(ge=1)
    minimum: float
    lower: float
    """First quartile."""
    median: float
    upper: float
    """Third quartile."""
    maximum: float

    @model_validator(mode="after")
    def _is_ordered(self) -> Spread:
        if not self.minimum <= self.lower <= self.median <= self.upper <= self.maximum:
            raise ValueError("expected minimum <= lower <= median <= upper <= maximum, all of them numbers")
        return self

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value; quartiles interpolate between values (method "inclusive" of Python's
        statistics).
        """
        lower, median, upper = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(
            repetitions=len(values), minimum=min(values), lower=lower, median=median, upper=upper, maximum=max(values)
        )


def turns(
    measurements: Sequence[Callable[[], T]],
    repeat: int,
    done: Callable[[int], None] = lambda turn: None,
    budget: float = math.inf,
) -> list[list[T]]:
    """The results of measurements taken in turns (A B C A B C), `repeat` times after one warm-up turn.

    A machine's speed drifts with its load and temperature; measurements in turns drift alike. `done` is called with the
    number of each turn, from 0. After `budget` seconds, `LEAST` turns besides the warm-up are enough.
    """
    rounds: list[list[T]] = []
    end = time.perf_counter() + budget
    while len(rounds) <= min(repeat, LEAST if time.perf_counter() > end else repeat):
        rounds.append([measure() for measure in measurements])
        done(len(rounds) - 1)
    return [list(values) for values in zip(*rounds[1:], strict=True)]


def seconds(work: Callable[[], object]) -> float:
    """Seconds of wall clock that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
