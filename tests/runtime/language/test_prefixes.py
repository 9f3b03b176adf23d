"""What a decoder has read before is found by its content and continued in a copy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.language.decoder import Conversation
from runtime.language.prefixes import SHARE, SHORTEST, Prefixes
from runtime.pipeline import Room

LONG = list(range(100, 100 + 2 * SHORTEST))


def kept(*conversations: list[int], room: int = 10_000) -> tuple[Prefixes, list[Conversation]]:
    prefixes, made = (
        Prefixes(Room(prefixes=room, position=10)),
        [Conversation(held=list(keys)) for keys in conversations],
    )
    for one in made:
        prefixes.keep(one)
    return prefixes, made


def lent(prefixes: Prefixes, keys: list[int]) -> Conversation:
    conversation = Conversation()
    prefixes.lend(conversation, keys)
    return conversation


def test_the_longest_beginning_is_continued_in_a_copy() -> None:
    prefixes, (short, long) = kept([*LONG[:SHORTEST], 1, 2], [*LONG, 3])
    found = lent(prefixes, [*LONG, 4, 5])
    assert found.origin is long.slot and found.slot is not long.slot and found.held == long.held
    assert lent(prefixes, [*LONG[:SHORTEST], 1, 9]).origin is short.slot


def test_what_is_not_worth_a_copy_is_read_again() -> None:
    prefixes, _ = kept([*LONG[:SHORTEST], *range(SHARE * SHORTEST)])
    assert lent(prefixes, [*LONG[: SHORTEST - 1], 7]).origin is None, "too short"
    assert lent(prefixes, [*LONG[:SHORTEST], 7]).origin is None, "too small a part of what would be copied"


def test_a_conversation_that_went_on_replaces_its_beginning() -> None:
    prefixes, (_, later) = kept(LONG, [*LONG, 1])
    assert lent(prefixes, LONG).origin is later.slot


def test_the_ones_used_longest_ago_go_first() -> None:
    first, second, third = ([start, *LONG] for start in range(3))
    prefixes, _ = kept(first, second, room=2 * 10 * len(first))
    assert lent(prefixes, first).origin is not None
    prefixes.keep(Conversation(held=list(third)))
    assert [lent(prefixes, keys).origin is not None for keys in (first, second, third)] == [True, False, True]


def test_nothing_is_kept_of_a_copy_that_was_never_made() -> None:
    """Its slot is empty until its first call."""
    prefixes, _ = kept()
    prefixes.keep(Conversation(held=list(LONG)).fork())
    assert lent(prefixes, LONG).origin is None


@given(st.lists(st.lists(st.integers(0, 2), max_size=3 * SHORTEST)), st.lists(st.integers(0, 2), max_size=3 * SHORTEST))
def test_what_is_lent_begins_as_the_prompt_does(conversations: list[list[int]], keys: list[int]) -> None:
    prefixes, made = kept(*conversations, room=500)
    found = lent(prefixes, keys)
    if found.origin is not None:
        shared = found.shared(keys)
        assert shared >= SHORTEST and shared * SHARE >= len(found.held)
        assert any(one.slot is found.origin and one.held == found.held for one in made)
