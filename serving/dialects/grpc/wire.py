"""Counts the fields of a protobuf message before it is parsed.

A parser makes an object of each nested message. An empty one has 2 bytes on the wire and about 50 in memory, so a
message within its size limit could still need a gigabyte. Source: the wire format in
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, I64, LEN, I32 = 0, 1, 2, 5
FIXED: Final = {I64: 8, I32: 4}


def fields_within(data: bytes, kind: Descriptor, most: int) -> bool:
    """Whether a message of this kind has at most `most` fields, including those of nested messages.

    Stops counting there. In malformed data only the readable beginning counts: parsing fails anyway.
    """
    pending = [(0, len(data), kind)]
    while pending:
        at, end, kind = pending.pop()
        while at < end:
            most -= 1
            if most < 0:
                return False
            tag, at = _varint(data, at, end)
            match tag & 7:
                case 0:
                    _, at = _varint(data, at, end)
                case 2:
                    size, at = _varint(data, at, end)
                    field = kind.fields_by_number.get(tag >> 3)
                    if (
                        field is not None
                        and field.type == FieldDescriptor.TYPE_MESSAGE
                        and field.message_type is not None
                    ):
                        pending.append((at, min(at + size, end), field.message_type))
                    at += size
                case wire:
                    at += FIXED.get(wire, 0)
    return True


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and the position behind it."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            break
    return value, at
