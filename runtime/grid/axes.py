"""Axes of a grid: a field of picture requests and its values, given as a text such as "10,20" or "1-9:2", or a list.

Besides the fields of `ImageRequest` that hold numbers, texts, switches and lengths there are "prompt_sr", which
searches the prompts for the first value and replaces it by each ("Prompt S/R" of Automatic1111's X/Y/Z plot), and
"loras.NAME", the scale of a LoRA, and "hires.FIELD", a field of the second pass.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, partial
from types import NoneType
from typing import Any, Final, get_args, get_origin, get_type_hints

from runtime import limits
from runtime.diffusion.hires import Hires
from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.tasks.image import PROMPTS, ImageRequest
from runtime.values import NUMBER, real, switch, whole

SEARCH: Final = "prompt_sr"
"""The field that searches and replaces."""
LORA: Final = "loras."
"""What the name of a LoRA stands behind."""
HIRES: Final = "hires."
"""What a field of the second pass stands behind."""
RANGE: Final = re.compile(rf"({NUMBER})-({NUMBER})(?::({NUMBER}))?", re.ASCII)
LONGEST: Final = 60
"""Characters of a range."""
WHOLE: Final = ("images", "preview_every", "denoising_start", "denoising_end")
"""Fields that would make a cell something else than one finished picture."""

Kind = Callable[[Any], Any]
"""Converts a value to that of a field. Raises ValueError that says what was expected."""


@dataclass(frozen=True)
class Axis:
    """`values` of a `field`, one for each column, row or block of a grid."""

    field: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Axis:
        """From FIELD=VALUES. Raises InvalidInput that names the axis, "x", "y" or "z"."""
        field, equals, values = text.partition("=")
        if not equals:
            raise InvalidInput(name, f"is {quoted(text)}, expected FIELD=VALUES such as steps=10,20")
        return cls.of(name, field.strip(), values)

    @classmethod
    def of(cls, name: str, field: str, values: str | Sequence[Any]) -> Axis:
        """From a field and its values: a text with commas between them, or a list. Raises InvalidInput that names the
        axis.
        """
        kind = _kind(name, field)
        given = _split(name, kind, values) if isinstance(values, str) else list(values)
        if not given:
            raise InvalidInput(name, f"has no values of {field}, expected one or more")
        limits.GRID_CELLS.length(name, given)
        try:
            return cls(field, tuple(map(kind, given)))
        except ValueError as error:
            raise InvalidInput(name, f"has a value of {field} that {error}") from None

    def changed(self, name: str, request: ImageRequest, value: Any) -> ImageRequest:
        """The request with this value. Raises InvalidInput that names the axis or the field."""
        if self.field.startswith(LORA):
            return replace(request, loras={**request.loras, self.field.removeprefix(LORA): value})
        if self.field.startswith(HIRES):
            field = self.field.removeprefix(HIRES)
            return replace(request, hires=replace(request.hires or Hires(), **{field: value}))
        if self.field == SEARCH:
            return self._replaced(name, request, value)
        return replace(request, **{self.field: value})

    def _replaced(self, name: str, request: ImageRequest, value: str) -> ImageRequest:
        search: str = self.values[0]
        if search not in request.prompt and search not in request.negative_prompt:
            raise InvalidInput(name, f"searches for {quoted(search)}, which neither prompt nor negative_prompt has")
        found: dict[str, Any] = {field: getattr(request, field).replace(search, value) for field in PROMPTS}
        return replace(request, **found)

    def labels(self) -> tuple[str, ...]:
        """A text for each value: of numbers and switches with the field's name, of texts the text alone."""
        return tuple(value if isinstance(value, str) else f"{self.field}: {shown(value)}" for value in self.values)

    def text(self) -> str:
        """The values as `of` reads them, where they have such a text."""
        return ",".join(f'"{text}"' if "," in text else text for text in map(shown, self.values))


def shown(value: Any) -> str:
    """A value as a text: 7.5, 512x768, true."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {scale:g}" for name, scale in value.items())
    return str(value)


@cache
def fields() -> dict[str, Kind]:
    """Every field that may be on an axis, and what converts its values; "loras.NAME" besides."""
    own = {name: kind for name, kind in _of_class(ImageRequest).items() if name not in WHOLE}
    later = {f"{HIRES}{name}": kind for name, kind in _of_class(Hires).items()}
    return {**own, **later, SEARCH: _text, "loras": _loras}


def _of_class(kind: type[ImageRequest | Hires]) -> dict[str, Kind]:
    """The fields of a class that may be on an axis."""
    hints = get_type_hints(kind)
    found = {field.name: _of_hint(hints[field.name]) for field in dataclasses.fields(kind)}
    return {name: converts for name, converts in found.items() if converts}


def _of_hint(hint: Any) -> Kind | None:
    kinds = [one for one in get_args(hint) or (hint,) if one is not NoneType]
    if get_origin(hint) is tuple or (len(kinds) == 1 and get_origin(kinds[0]) is tuple):
        lengths = get_args(hint if get_origin(hint) is tuple else kinds[0])
        return partial(_lengths, len(lengths)) if set(lengths) == {int} else None
    return KINDS.get(kinds[0]) if len(kinds) == 1 else None


def _kind(name: str, field: str) -> Kind:
    if field.startswith(LORA) and field != LORA:
        return real
    if field not in fields():
        raise InvalidInput(
            name, f"{quoted(field)} cannot be on an axis: {did_you_mean(field, [*fields(), 'loras.NAME'])}"
        )
    return fields()[field]


def _split(name: str, kind: Kind, text: str) -> list[Any]:
    """The values in a text. Those with commas stand in double quotes. Raises InvalidInput."""
    if kind is _text:
        return [one.strip() for one in next(csv.reader([text], skipinitialspace=True), [])]
    found: list[Any] = []
    for part in (part.strip() for part in text.split(",")):
        span = RANGE.fullmatch(part) if kind in (whole, real) else None
        if span and len(part) > LONGEST:
            raise InvalidInput(name, f"has the range {quoted(part)}, expected at most {LONGEST} characters")
        found += _range(name, *span.groups()) if span else [part]
    return found


def _range(name: str, first: str, last: str, step: str | None) -> list[str]:
    """The numbers of FIRST-LAST:STEP, the last one included where a step meets it."""
    begin, end = Decimal(first), Decimal(last)
    by = Decimal(step) if step else Decimal(1 if end >= begin else -1)
    if not by or (end - begin) / by < 0:
        raise InvalidInput(name, f"has the range {first}-{last}:{by}, whose step does not lead from {first} to {last}")
    count = int((end - begin) / by) + 1
    limits.GRID_CELLS.count(name, count)
    return [str(begin + i * by) for i in range(count)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {value!r:.100}, expected a text")
    return value


def _lengths(count: int, value: Any) -> tuple[int, ...]:
    """From a list, or a text such as 512x768."""
    parts = value.split("x") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != count:
        raise ValueError(f"is {value!r:.100}, expected {count} lengths in pixels such as {'x'.join(['64'] * count)}")
    return tuple(map(whole, parts))


def _loras(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"is {value!r:.100}, expected scales by name; loras.NAME is the scale of one LoRA")
    return {_text(name): real(scale) for name, scale in value.items()}


KINDS: Final[Mapping[Any, Kind]] = {int: whole, float: real, str: _text, bool: switch}
