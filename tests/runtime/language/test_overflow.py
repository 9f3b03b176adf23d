"""Which messages of a long conversation stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.language.overflow import slid
from runtime.language.text import Message

PICTURE = np.zeros((2, 2, 3), np.uint8)
SYSTEM = Message("system", ("be brief",))


def turn(name: str, picture: bool = False) -> list[Message]:
    return [Message("user", (PICTURE, name) if picture else (name,)), Message("assistant", (f"to {name}",))]


def texts(messages: Sequence[Message]) -> list[str]:
    return [part for message in messages for part in message.content if isinstance(part, str)]


def test_the_oldest_turns_go_and_no_more_than_needed() -> None:
    messages = [SYSTEM, *turn("a"), *turn("b", picture=True), *turn("c"), Message("user", ("d",))]
    kept = ["be brief", "a", "to a", "b", "to b", "c", "to c", "d"]
    assert texts(slid(messages, lambda some: len(some) <= 8)) == kept
    assert texts(slid(messages, lambda some: len(some) <= 7)) == [text for text in kept if "a" not in text[-1:]]
    assert texts(slid(messages, lambda some: len(some) <= 4)) == ["be brief", "b", "to b", "d"]
    assert texts(slid(messages, lambda some: False)) == ["be brief", "b", "to b", "d"]


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.booleans()), max_size=20), st.integers(0)
)
def test_what_stays_stays_in_order(shape: list[tuple[str, bool]], most: int) -> None:
    messages = [
        Message(role, (PICTURE,) if picture and role == "user" else ("x",))  # type: ignore[arg-type]
        for role, picture in shape
    ]
    messages.append(Message("user", ("last",)))
    kept = slid(messages, lambda some: len(some) <= most)
    places = [next(i for i, message in enumerate(messages) if message is one) for one in kept]
    assert places == sorted(places) and kept[-1] is messages[-1]
    gone = [message for message in messages if not any(message is one for one in kept)]
    assert not any(message.role == "system" or message.images for message in gone)
    assert len(messages) > most or not gone
