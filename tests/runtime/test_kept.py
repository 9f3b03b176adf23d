"""What may be used again is held within a budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.kept import Kept


def test_the_one_used_longest_ago_goes_first() -> None:
    cache = Kept[bytes, str](30)
    for key in (b"a", b"b", b"c"):
        cache.put(key, "x", 10)
    assert cache.get(b"a") is not None
    cache.put(b"d", "x", 10)
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    cache.put(b"e", "x", 31)
    assert cache.get(b"e") is None and cache.get(b"d") is not None, "what does not fit displaces nothing"
    cache.put(b"d", "x", 31)
    assert cache.get(b"d") is None, "the value before is not the one that was put"


def test_nothing_is_held_without_a_budget() -> None:
    cache = Kept[bytes, str]()
    cache.put(b"a", "x", 1)
    assert cache.get(b"a") is None


@given(st.lists(st.tuples(st.binary(max_size=1), st.integers(0, 40))), st.integers(0, 50))
def test_the_budget_holds(puts: list[tuple[bytes, int]], most: int) -> None:
    cache = Kept[bytes, str](most)
    for key, length in puts:
        cache.put(key, "x", length)
        assert cache.nbytes <= most
        if length <= most:
            assert cache.get(key) is not None
