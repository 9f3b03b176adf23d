"""Finds the files of external data that an ONNX graph reads, without the library onnx.

Messages and field numbers are from onnx.proto (ONNX 1.23), the encoding is that of protocol buffers
(https://protobuf.dev/programming-guides/encoding). Messages without the word "location" are skipped, so a large graph
takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

WORD: Final = b"location"
"""The key of an entry with the name of a file."""
NESTED: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""For each message, the fields that may contain external data, and the messages in them."""
KEY, VALUE = 1, 2
"""Fields of an entry."""
VARINT, EIGHT, COUNTED, FOUR = 0, 1, 2, 5
DEEPEST: Final = 100
"""The deepest nesting of messages, as in protocol buffers' own parsers."""


def locations(model: bytes) -> list[str]:
    """The locations of external data in a serialized ModelProto, each once. Raises ValueError if it is damaged."""
    return list(dict.fromkeys(_locations(memoryview(model), "model", DEEPEST)))


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if WORD not in bytes(message):
        return
    if not depth:
        raise ValueError("it nests too deeply")
    if kind == "entry":
        entry = dict(_fields(message))
        if bytes(entry.get(KEY, b"")) == WORD:
            yield bytes(entry.get(VALUE, b"")).decode("utf-8")
        return
    for number, content in _fields(message):
        if number in NESTED[kind]:
            yield from _locations(content, NESTED[kind][number], depth - 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message, such as strings and messages. Others are skipped."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        kind = tag & 7
        length = {VARINT: 0, EIGHT: 8, FOUR: 4}.get(kind)
        if kind == VARINT:
            _, position = _varint(message, position)
        elif kind == COUNTED:
            length, position = _varint(message, position)
        if length is None or position + length > end:
            raise ValueError("it is no ONNX graph")
        if kind == COUNTED:
            yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A varint (seven bits in each byte, the lowest first) and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError("it is no ONNX graph")
