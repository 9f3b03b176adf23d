"""Whether differences that are planted are found, and others are not."""

from __future__ import annotations

import numpy as np
import pytest

from profiles.compare import bootstrap
from profiles.compare.bootstrap import ratio

TRIALS = 40


def series(seed: int, count: int, drift: float) -> tuple[list[float], list[float]]:
    """Times of two programs that are equally fast, with 1 % of noise, on a machine that drifts."""
    draws = np.random.default_rng(seed)
    common = np.exp(drift * draws.standard_normal(count))
    return tuple((common * np.exp(0.01 * draws.standard_normal(count))).tolist() for _ in range(2))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)


@pytest.mark.parametrize("count", [8, 15])
@pytest.mark.parametrize(("drift", "paired"), [(0.0, False), (0.0, True), (0.05, True)])
def test_planted_differences_are_found_and_chance_is_not(count: int, drift: float, paired: bool) -> None:
    found = missed = 0
    for seed in range(TRIALS):
        first, second = series(seed, count, drift)
        found += ratio(first, second, paired, 0.95).differs
        slower = ratio(first, [1.05 * one for one in second], paired, 0.95)
        missed += not slower.differs
        assert slower.lower <= slower.value <= slower.upper
    assert found <= 0.1 * TRIALS and missed <= 0.1 * TRIALS


def test_a_drift_widens_what_was_not_measured_in_turns() -> None:
    first, second = series(0, 15, 0.05)
    paired, alone = (ratio(first, second, turns, 0.95) for turns in (True, False))
    assert paired.value == alone.value
    assert paired.upper - paired.lower < 0.5 * (alone.upper - alone.lower)


def test_the_interval_is_the_same_at_each_call_and_grows_with_confidence() -> None:
    first, second = series(1, 10, 0.0)
    assert ratio(first, second, True, 0.95) == ratio(first, second, True, 0.95)
    more, less = ratio(first, second, True, 0.99), ratio(first, second, True, 0.9)
    assert more.lower <= less.lower and more.upper >= less.upper
    with pytest.raises(ValueError, match="same number"):
        ratio(first, second[1:], True, 0.95)
