from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serving.dialects.grpc.wire import fields_within
from serving.enginecast_pb import chat_pb2, image_pb2


def count(message: Any) -> int:
    """Fields that a message has on the wire, by the library's own reflection."""
    total = 0
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        total += len(values) + (sum(map(count, values)) if field.message_type is not None else 0)
    return total


@given(
    st.lists(st.lists(st.none() | st.text(max_size=3) | st.binary(max_size=3), max_size=4), max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_fields_are_counted_as_the_library_does(turns: list[list[str | bytes | None]], tokens: int) -> None:
    message = chat_pb2.ChatRequest(model="m", max_tokens=tokens, temperature=0.5, stop=["a", "b"], seed=2**64 - 1)
    for parts in turns:
        turn = message.messages.add(role=chat_pb2.ROLE_USER)
        for part in parts:
            turn.parts.add(**({} if part is None else {"text": part} if isinstance(part, str) else {"image": part}))
    data, total = message.SerializeToString(), count(message)
    assert fields_within(data, message.DESCRIPTOR, total)
    assert not fields_within(data, message.DESCRIPTOR, total - 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_looked_at(data: bytes) -> None:
    assert fields_within(data, image_pb2.GenerateRequest.DESCRIPTOR, 1000)


def test_a_million_empty_parts_are_too_many() -> None:
    parts = b"\x12\x00" * 1_000_000
    prefix = b"\x12" + bytes([len(parts) & 0x7F | 0x80, len(parts) >> 7 & 0x7F | 0x80, len(parts) >> 14])
    assert not fields_within(prefix + parts, chat_pb2.ChatRequest.DESCRIPTOR, 10_000)
