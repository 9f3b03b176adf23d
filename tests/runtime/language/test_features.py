"""Features of pictures are held within a budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.language.features import FeatureCache


def features(length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.zeros(length, np.uint8)


def test_the_one_used_longest_ago_goes_first() -> None:
    cache = FeatureCache(30)
    for key in (b"a", b"b", b"c"):
        cache.put(key, features(10))
    assert cache.get(b"a") is not None
    cache.put(b"d", features(10))
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    cache.put(b"e", features(31))
    assert cache.get(b"e") is None and cache.nbytes <= 30


def test_nothing_is_held_without_a_budget() -> None:
    cache = FeatureCache()
    cache.put(b"a", features(1))
    assert cache.get(b"a") is None


@given(st.lists(st.tuples(st.binary(max_size=1), st.integers(0, 40))), st.integers(0, 50))
def test_the_budget_holds(puts: list[tuple[bytes, int]], most: int) -> None:
    cache = FeatureCache(most)
    for key, length in puts:
        cache.put(key, features(length))
        assert cache.nbytes <= most
        if length <= most:
            assert cache.get(key) is not None
