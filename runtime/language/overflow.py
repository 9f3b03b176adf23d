"""Conversations longer than the model's context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final, Literal, get_args

from runtime.language.text import Message

Overflow = Literal["refuse", "slide"]
"""What becomes of a conversation that does not fit the context: an error, or its oldest turns are left out."""
OVERFLOWS: Final[tuple[str, ...]] = get_args(Overflow)


def slid(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> list[Message]:
    """The messages without the oldest turns, as few as it takes for the rest to fit; without all that may be left out
    if that is not enough.

    A turn is a question and what follows it up to the next. System messages, turns with pictures and the last turn
    stay.
    """
    if fits(messages):  # as most do: one look at the whole, where a search would take several
        return list(messages)
    spare = [turn for turn in _turns(messages)[:-1] if not any(messages[place].images for place in turn)]

    def without(count: int) -> list[Message]:
        gone = {place for turn in spare[:count] for place in turn}
        return [message for place, message in enumerate(messages) if place not in gone]

    return without(1 + bisect_left(range(1, len(spare)), True, key=lambda count: fits(without(count))))


def _turns(messages: Sequence[Message]) -> list[list[int]]:
    """The places of each turn's messages. What stands before the first question, and system messages, are in none."""
    turns: list[list[int]] = []
    for place, message in enumerate(messages):
        if message.role == "user":
            turns.append([place])
        elif message.role in ("assistant", "tool") and turns:
            turns[-1].append(place)
    return turns
