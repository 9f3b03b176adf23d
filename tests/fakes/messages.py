"""Messages of any protobuf type by hypothesis, made from its descriptor: names of models that exist, numbers at the
limits, texts and files that nobody expects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

DEEPEST: Final = 4
MOST: Final = 4
"""Items of a repeated field."""
NAMES: Final = ("name", "model", "model_name", "service", "id", "model_version", "version")
"""Fields that name what a server has."""
TEXTS: Final = (
    *("", "x", "ddim", "openvino", "<image>", "</s>", "{{ 1 }}", "%s%n", "../../etc/passwd", "file:///etc/passwd"),
    *("http://127.0.0.1:1/", "\0", "\x1b[31m", "a\u202eb", "\U000103ff" * 300, "a" * 100_000, "FP32", "BYTES", "-1"),
)
WHOLE: Final = (0, 1, 2, 3, 7, 8, 63, 64, 65, 128, 512, 1000, 1001, 4096, 2**31 - 1)
REALS: Final = (0.0, -0.0, 1.0, -1.0, 0.01, 100.0, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"))


def messages(
    descriptor: Descriptor, known: Sequence[str], files: Sequence[bytes], depth: int = 0
) -> st.SearchStrategy[Message]:
    """Messages of a type; `known` are names that the server has, `files` are what bytes may be."""
    fields = [field for field in descriptor.fields if depth < DEEPEST or field.message_type is None]

    @st.composite
    def made(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Message:
        message: Message = GetMessageClass(descriptor)()
        for field in fields:
            if draw(st.integers(0, 9)) < 6:
                _set(message, field, draw(_value(field, known, files, depth)))
        return message

    return made()


def altered(base: Message, known: Sequence[str], files: Sequence[bytes]) -> st.SearchStrategy[Message]:
    """Messages like `base` with at most three other fields, at any depth."""

    @st.composite
    def made(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Message:
        message = type(base).FromString(base.SerializeToString())
        for _ in range(draw(st.integers(0, 3))):
            place: Any = message
            while (inner := _inside(place)) and draw(st.booleans()):
                place = draw(st.sampled_from(inner))
            field = draw(st.sampled_from(list(place.DESCRIPTOR.fields)))
            place.ClearField(field.name)
            _set(place, field, draw(_value(field, known, files, 1)))
        return message

    return made()


def _inside(message: Message) -> list[Message]:
    """The messages of its fields that are set."""
    found: list[Message] = []
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            found += value if field.is_repeated else [value]
    return found


def _set(message: Any, field: FieldDescriptor, value: Any) -> None:
    target = getattr(message, field.name)
    if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
        for entry in value:
            if entry.DESCRIPTOR.fields_by_name["value"].message_type is None:
                target[entry.key] = entry.value
            else:
                target[entry.key].CopyFrom(entry.value)
    elif field.is_repeated:
        target.extend(value)
    elif field.message_type is not None:
        target.CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _value(field: FieldDescriptor, known: Sequence[str], files: Sequence[bytes], depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        one = messages(field.message_type, known, files, depth + 1)
    else:
        one = _scalar(field, known, files)
    return st.lists(one, max_size=MOST) if field.is_repeated else one


def _scalar(field: FieldDescriptor, known: Sequence[str], files: Sequence[bytes]) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if field.type == field.TYPE_STRING:
        names = st.sampled_from(known) if field.name in NAMES else st.nothing()
        return names | names | st.sampled_from(TEXTS) | st.text(max_size=40).filter(_is_utf8)
    if field.type == field.TYPE_BYTES:
        return st.sampled_from(files) | st.binary(max_size=64)
    if kind == field.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        single = kind == field.CPPTYPE_FLOAT
        return st.sampled_from([real for real in REALS if not single or abs(real) < 1e38]) | st.floats(
            width=32 if single else 64
        )
    if kind == field.CPPTYPE_ENUM:
        return st.sampled_from([0, 1, 2, 3, 99, -1])
    bits = 32 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return st.sampled_from([*WHOLE, high, low, *([-1] if signed else [])]) | st.integers(low, high)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
