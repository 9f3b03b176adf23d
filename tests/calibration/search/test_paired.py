"""What paired cases tell: lost and gained ones, how sure a drop is, and that few cases are never sure of little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.search.paired import Paired


def test_only_differences_count() -> None:
    seen = Paired().seen([True, True, False, False], [True, False, True, False]).seen([True], [False])
    assert seen == Paired(cases=5, lost=2, gained=1)
    assert seen.drop == pytest.approx(20)
    assert Paired().drop == 0
    with pytest.raises(ValueError, match="zip"):
        Paired().seen([True], [])


def test_as_published() -> None:
    """Bonett and Price: (lost + 1 - gained - 1) / (n + 2), with 95 % two-sided at 1.96 standard errors."""
    seen = Paired(cases=98, lost=9, gained=1)
    assert seen.sure(8.0) == pytest.approx(0.5)
    error = np.sqrt((0.10 + 0.02 - 0.08**2) / 100) * 100
    assert seen.sure(8.0 + 1.96 * error) == pytest.approx(0.975, abs=1e-3)
    assert seen.resolution == pytest.approx(1.645 * error)


def test_a_hundred_cases_without_a_difference_do_not_tell_one_point() -> None:
    assert Paired(cases=100).sure(1.0) < 0.8 < 0.98 < Paired(cases=400).sure(1.0)
    assert Paired(cases=100).resolution > 2


@given(st.integers(1, 500), st.data())
def test_more_room_is_surer_and_more_loss_less(cases: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, cases))
    gained = data.draw(st.integers(0, cases - lost))
    seen = Paired(cases, lost, gained)
    assert 0 <= seen.sure(-1) <= seen.sure(0) <= seen.sure(1) <= 1
    assert seen.resolution > 0
    if gained:
        assert Paired(cases, lost + 1, gained - 1).sure(0) <= seen.sure(0)


def test_bounds_hold_as_often_as_they_say() -> None:
    """The drop is beyond drop + resolution in about 5 % of trials."""
    generator = np.random.default_rng(0)
    for lost, gained in ((0.02, 0.01), (0.06, 0.03), (0.01, 0.01)):
        counts = generator.multinomial(300, [lost, gained, 1 - lost - gained], 2000)
        beyond = [Paired(300, int(a), int(b)).sure(100 * (lost - gained)) < 0.05 for a, b, _ in counts]
        assert 0.01 < np.mean(beyond) < 0.075
