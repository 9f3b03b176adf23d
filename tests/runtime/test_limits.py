"""Limits are declared once, listed in docs/limits.md, and say something of every field that a client can send."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor

from runtime import limits
from runtime.diffusion.guides import Control, Style
from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.language.text import Message
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from serving.enginecast_pb import chat_pb2, embed_pb2, image_pb2, inference_pb2, job_pb2, model_pb2

PIXELS = np.zeros((2, 2, 3), np.uint8)
DOC = Path(__file__).parents[2] / "docs" / "limits.md"


def item(limit: limits.Limit) -> str:
    """A limit as an item of the list in docs/limits.md."""
    value = f"{limit.most:,}" if limit.least is None else f"{limit.least:,} to {limit.most:,}"
    fields = ", ".join(f"`{field}`" for field in limit.fields)
    text = f"- **{limit.name}**: {value} {limit.unit}; {limit.why}.{f' Fields: {fields}.' if fields else ''}"
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False)


def test_the_page_has_every_limit_with_its_value() -> None:
    expected = "\n".join(map(item, limits.LIMITS))
    assert expected in DOC.read_text(), f"the list in docs/limits.md should be:\n{expected}"


def fields(message: Descriptor) -> set[str]:
    """What a request holds itself, by message and field, without what has few values."""
    found = set()
    for field in message.fields:
        if field.message_type is not None:
            found |= fields(field.message_type) | {f"{message.name}.{field.name}"}
        elif field.type not in (field.TYPE_BOOL, field.TYPE_ENUM):
            found.add(f"{message.name}.{field.name}")
    return found


def test_every_field_of_every_request_has_a_limit() -> None:
    services = [
        service
        for pb2 in (chat_pb2, embed_pb2, image_pb2, inference_pb2, job_pb2, model_pb2)
        for service in pb2.DESCRIPTOR.services_by_name.values()
    ]
    sent = {field for service in services for method in service.methods for field in fields(method.input_type)}
    assert sent and sent <= {field for limit in limits.LIMITS for field in limit.fields}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": "x" * 10_001}, "prompt"),
        ({"negative_prompt": "x" * 1_000_000}, "negative_prompt"),
        ({"sampler": "ddim" * 1_000_000}, "sampler"),
        ({"steps": 1001}, "steps"),
        ({"images": 65}, "images"),
        ({"preview_every": 2**32 - 1}, "preview_every"),
        ({"preview_every": -1}, "preview_every"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"eta": math.nan}, "eta"),
        ({"eta": -0.1}, "eta"),
        ({"width": 2**32 - 1}, "width"),
        ({"seed": 2**63 - 1, "images": 2}, "seed"),
        ({"controls": (Control("x", PIXELS),) * 9}, "controls"),
        ({"styles": (Style("x", PIXELS),) * 9}, "styles"),
    ],
)
def test_a_picture_request_beyond_a_limit_names_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ImageRequest(**({"prompt": "x"} | change))  # type: ignore[arg-type]
    assert caught.value.field == field and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": (Message("user", ("x",)),) * 1001}, "messages"),
        ({"messages": (Message("user", ("",) * 2001),)}, "messages"),
        ({"messages": (Message("user", ("x" * 60_000, "x" * 60_000)),)}, "messages"),
        ({"stop": ("a" * 3_000_000,)}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"max_tokens": 2**32 - 1}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_a_conversation_beyond_a_limit_names_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ChatRequest(**({"messages": (Message("user", ("x",)),)} | change))  # type: ignore[arg-type]
    assert caught.value.field == field and len(str(caught.value)) < 200


def test_names_are_quoted_in_short() -> None:
    assert quoted("int8") == "'int8'"
    assert quoted("a\0\x1b[31m\u202e") == r"'a\x00\x1b[31m\u202e'"
    assert quoted("x" * 1000) == f"'{'x' * 100}...' (1,000 characters)"


def test_a_very_long_name_is_compared_with_nothing() -> None:
    assert did_you_mean("int8" * 1_000_000, ["int8", "int4"]) == "(known: int4, int8)"
