"""Whether two series of measurements differ: a bootstrap interval of the ratio of their medians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

RESAMPLES: Final = 10_000
LEAST: Final = 6
"""The fewest measurements for a verdict: with fewer, intervals of medians miss the truth too often."""


@dataclass(frozen=True)
class Ratio:
    """The second median in parts of the first, and the interval that has it with the requested confidence."""

    value: float
    lower: float
    upper: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.lower <= 1.0 <= self.upper


def ratio(first: Sequence[float], second: Sequence[float], paired: bool, level: float) -> Ratio:
    """The ratio of the medians of two series of positive numbers, with its percentile interval (Efron 1979).

    Paired series were measured in turns: the same turns of both are drawn, so that a drift of the machine, which both
    share, widens nothing. Others are drawn independently. The draws are the same at each call. Raises ValueError for
    paired series of different lengths.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if paired and len(a) != len(b):
        raise ValueError("paired series have the same number of measurements")
    draws = np.random.default_rng(0)
    turns = draws.integers(0, len(a), (RESAMPLES, len(a)))
    others = turns if paired else draws.integers(0, len(b), (RESAMPLES, len(b)))
    ratios = np.median(b[others], axis=1) / np.median(a[turns], axis=1)
    lower, upper = np.quantile(ratios, ((1 - level) / 2, (1 + level) / 2))
    return Ratio(float(np.median(b) / np.median(a)), float(lower), float(upper))
