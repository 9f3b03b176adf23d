"""Numbers and switches are read exactly, from values and from texts, and what is none is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import InvalidInput
from runtime.values import named, real, switch, whole


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (whole, "18446744073709551615", 2**64 - 1),
        (whole, " -7 ", -7),
        (whole, "20.0", 20),
        (whole, 20.0, 20),
        (whole, 3, 3),
        (real, "7.5", 7.5),
        (real, 2, 2.0),
        (real, " -1e-3", -0.001),
        (switch, "on", True),
        (switch, "No", False),
        (switch, "1", True),
        (switch, False, False),
    ],
)
def test_values(read: Callable[[Any], Any], value: Any, expected: Any) -> None:
    found = named("steps", read, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("read", "value", "why"),
    [
        (whole, "1.5", "is '1.5', expected a whole number"),
        (whole, 1.5, "is 1.5, expected a whole number"),
        (whole, "", "is '', expected a whole number"),
        (whole, "1e999999999", "is '1e999999999', expected a whole number"),
        (whole, "1" * 29, f"is '{'1' * 29}', expected a whole number"),
        (whole, math.nan, "is nan, expected a whole number"),
        (whole, math.inf, "is inf, expected a whole number"),
        (whole, True, "is True, expected a whole number"),
        (real, "many", "is 'many', expected a number"),
        (real, "1e999", "is '1e999', expected a number"),
        (real, [1], "is [1], expected a number"),
        (real, True, "is True, expected a number"),
        (switch, "maybe", "is 'maybe', expected on or off"),
        (switch, 1, "is 1, expected on or off"),
    ],
)
def test_what_is_none_is_named(read: Callable[[Any], Any], value: Any, why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        named("steps", read, value)
    assert caught.value.field == "steps" and caught.value.reason == why
