"""Which files an ONNX graph reads besides its own: the locations of its external data, found without any library that
reads ONNX.

Messages and field numbers are those of onnx.proto (ONNX 1.23), the encoding is that of protocol buffers
(https://protobuf.dev/programming-guides/encoding). Only what contains the word is looked into, so a large graph takes
milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

WORD: Final = b"location"
"""The key of the entry that names a file."""
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
"""By message, the fields that lead to external data, and what message each holds."""
KEY, VALUE = 1, 2
"""Fields of an entry."""
VARINT, EIGHT, COUNTED, FOUR = 0, 1, 2, 5
DEEPEST: Final = 100
"""Messages within messages that are followed, as many as protocol buffers' own readers follow."""


def locations(model: bytes) -> list[str]:
    """The locations that the tensors of a serialized ModelProto name, each once. Raises ValueError where it cannot be
    read.
    """
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
    """The fields of a message that have a counted length, as all texts and messages have; others are passed over."""
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
    """A number of seven bits a byte, the lowest first, and where it ends."""
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
