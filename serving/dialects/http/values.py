"""How many values a JSON text may hold: each becomes an object in memory before anything can be checked."""

from __future__ import annotations

import re
from typing import Final

from runtime import limits
from runtime.errors import InvalidInput

STRINGS: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
"""The strings of a JSON text."""


def check_values(data: bytes, field: str) -> None:
    """Raise InvalidInput naming `field` for more values than a message may have fields."""
    if _marks(data) > limits.FIELDS.most and _marks(STRINGS.sub(b"", data)) > limits.FIELDS.most:
        raise InvalidInput(field, f"has more than {limits.FIELDS.most:,} values, nested ones included: send fewer")


def _marks(text: bytes) -> int:
    """What begins or separates values in JSON, also those in strings."""
    return sum(map(text.count, (b"{", b"[", b",")))
