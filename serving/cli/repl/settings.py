"""What /set changes: the fields of dataclasses of options, read from text as their annotations say."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.values import named, real, switch, whole
from serving.cli import terminal

G = TypeVar("G")


@dataclass(frozen=True)
class Setting:
    """One setting: what is read (`kind` is a type, list, or Literal with its choices), the range of a number, and what
    it is for.
    """

    kind: Any
    option: OptionInfo

    def read(self, name: str, text: str) -> Any:
        """The value that a text stands for. Raises InvalidInput naming the setting."""
        if get_origin(self.kind) is Literal:
            return _choice(name, text, get_args(self.kind))
        value = READERS[get_origin(self.kind) or self.kind](name, text)
        least, most = self.option.min, self.option.max
        low, high = least is not None and value < least, most is not None and value > most
        if low or high:
            bound = f"at least {least:g}" if low else f"at most {most:,}"
            raise InvalidInput(name, f"is {text}, expected {bound}")
        return value


class Settings:
    """Groups of options: instances of frozen dataclasses, whose fields are annotated as options of typer. A change
    makes another `Settings`.
    """

    def __init__(self, *groups: Any) -> None:
        self._groups = groups

    def of(self, kind: type[G]) -> G:
        """The group of this class."""
        return next(group for group in self._groups if isinstance(group, kind))

    def set(self, name: str, text: str) -> Settings:
        """With one changed. Raises InvalidInput for an unknown setting or a value that it cannot have."""
        group, field = self._find(name)
        return self._with(group, field, settings_of(type(group))[field.name].read(field.name, text))

    def unset(self, name: str) -> Settings:
        """With one as it is by default. Raises InvalidInput for an unknown setting."""
        group, field = self._find(name)
        return self._with(group, field, field.default)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, value and purpose of each setting; an empty value is the model's default."""
        for group in self._groups:
            for field in fields(group):
                help = settings_of(type(group))[field.name].option.help
                yield field.name, _shown(getattr(group, field.name)), help or ""

    def _find(self, name: str) -> tuple[Any, Field[Any]]:
        known = {field.name: (group, field) for group in self._groups for field in fields(group)}
        if (asked := name.replace("-", "_")) not in known:
            raise InvalidInput("/set", f"knows no {quoted(name)}: {did_you_mean(asked, known)}")
        return known[asked]

    def _with(self, group: Any, field: Field[Any], value: Any) -> Settings:
        changed = replace(group, **{field.name: value})
        return Settings(*(changed if one is group else one for one in self._groups))


def settings_of(group: type[Any]) -> dict[str, Setting]:
    """The settings of a dataclass by name."""
    return {name: _setting(hint) for name, hint in get_type_hints(group, include_extras=True).items()}


def _setting(hint: Any) -> Setting:
    """From Annotated[KIND, Option(...)] or Annotated[KIND | None, Option(...)]."""
    assert get_origin(hint) is Annotated, hint
    plain, option = get_args(hint)[:2]
    kinds = [kind for kind in get_args(plain) if kind is not NoneType]
    optional = NoneType in get_args(plain)
    return Setting(kinds[0] if optional else plain, option)


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        raise InvalidInput(name, f"is {quoted(text)}, which has a quote that is not closed") from None


def _choice(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise InvalidInput(name, f"is {quoted(text)}: {did_you_mean(text, choices)}")
    return text


READERS: Final[dict[Any, Callable[[str, str], Any]]] = {
    int: lambda name, text: named(name, whole, text),
    float: lambda name, text: named(name, real, text),
    bool: lambda name, text: named(name, switch, text),
    list: _words,
    str: lambda name, text: text,
    Path: terminal.path,
}
"""What reads each kind, by the setting's name and the text."""


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "on" if value else "off"
        case list():
            return shlex.join(value)
    return str(value)
