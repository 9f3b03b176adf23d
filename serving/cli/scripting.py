"""Scripts on the command line: how they are named, and the list of those that are installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidInput, quoted

if TYPE_CHECKING:
    from serving.enginecast_pb import model_pb2


def parse_scripts(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Scripts by name from NAME[:ARGUMENT=VALUE], several arguments of one from several texts. A value that begins with
    [ or { is JSON, any other a text. Raises InvalidInput.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        arguments = found.setdefault(name, {})
        argument, equals, value = rest.partition("=")
        if not name or (colon and not (argument and equals)):
            raise InvalidInput("script", f"is {quoted(text)}, expected NAME or NAME:ARGUMENT=VALUE")
        if argument in arguments:
            raise InvalidInput("script", f"gives {quoted(name)} the argument {quoted(argument)} twice")
        if argument:
            arguments[argument] = _value(text, value)
    return found


def _value(text: str, value: str) -> Any:
    if not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("script", f"{quoted(text)} has a value that is no JSON: {error}") from None


def lines(found: Iterable[model_pb2.ScriptInfo]) -> Iterator[str]:
    """A line for each script, and one for each of its arguments."""
    for one in found:
        of = f" ({', '.join(one.tasks)})" if one.tasks else ""
        yield f"{one.name}{of}: {f'cannot be used: {one.error}' if one.error else one.summary}"
        schema = json.loads(one.arguments_schema or "{}")
        for name in schema.get("properties", {}):
            yield f"    {name}{'' if name in schema.get('required', ()) else ' (optional)'}"
