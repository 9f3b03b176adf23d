"""Values that people write as texts: numbers and switches. What cannot be read raises ValueError, which says what it is
and what was expected; whoever knows the field makes an InvalidInput of it (`named`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final, TypeVar

from runtime.errors import InvalidInput, quoted

T = TypeVar("T")

NUMBER: Final = r"-?\d+(?:\.\d+)?"
LONGEST: Final = 28
"""Characters of a whole number: `Decimal` calculates with so many digits."""
SWITCHES: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def named(field: str, read: Callable[[Any], T], value: Any) -> T:
    """The value, read. Raises InvalidInput that names the field."""
    try:
        return read(value)
    except ValueError as error:
        raise InvalidInput(field, str(error)) from None


def real(value: Any) -> float:
    """A finite number, from one or from a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"is {_shown(value)}, expected a number")
    return number


def whole(value: Any) -> int:
    """A whole number, exactly, from one such as 20 or 20.0, or from a text of it."""
    text = value.strip() if isinstance(value, str) else ""
    number = Decimal(text) if len(text) <= LONGEST and re.fullmatch(NUMBER, text, re.ASCII) else value
    if isinstance(number, bool) or not isinstance(number, int | float | Decimal) or number != number // 1:
        raise ValueError(f"is {_shown(value)}, expected a whole number")
    return int(number)


def switch(value: Any) -> bool:
    """On or off, also as true and false, yes and no, 1 and 0."""
    found = SWITCHES.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"is {_shown(value)}, expected on or off")
    return found


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else f"{value!r:.100}"
