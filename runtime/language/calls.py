"""Calls of functions in conversations: how a model's chat template writes them, found by trying it.

Published templates write a call in forms of their own, most of them as JSON with something around it. So a template is
tried once with a function, a call and its result: what stands around the call's name and arguments is the form that its
model was trained to answer in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import InvalidInput

NAME: Final = "qxtool"
DOES: Final = "qxdoes"
ARGUMENTS: Final = {"qxkey": "qxvalue"}
RESULT: Final = "qxresult"
"""Words for trying a template, which none contains."""
TRIED: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": DOES,
        "parameters": {"type": "object", "properties": {"qxkey": {"type": "string"}}, "required": ["qxkey"]},
    },
}
"""The function that a template is tried with, as templates take functions."""


@dataclass(frozen=True)
class ToolCall:
    """A call of the function `name`. `arguments` is what JSON can say."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        """The call as templates take it."""
        return {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}

    @property
    def text(self) -> str:
        """Name and arguments as one JSON text, whose length counts as that of a text."""
        return json.dumps([self.name, dict(self.arguments)], ensure_ascii=False)

    def check(self, field: str) -> None:
        """Raise InvalidInput naming `field` unless JSON can say it in Unicode."""
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise InvalidInput(field, "holds half a surrogate pair, which is no Unicode text") from None
        except (TypeError, ValueError, RecursionError):
            raise InvalidInput(field, "has arguments that cannot be written as JSON") from None


@dataclass(frozen=True)
class CallForm:
    """What a model writes around the name and the arguments of a call: `before`, NAME, `middle`, ARGUMENTS, `after`."""

    before: str
    middle: str
    after: str

    def read(self, text: str) -> ToolCall | None:
        """The call of a text that follows `before`, None where it is not whole."""
        name, middle, rest = text.partition(self.middle)
        try:
            arguments, end = json.JSONDecoder().raw_decode(rest.lstrip())
        except (ValueError, RecursionError):
            return None
        whole = middle and isinstance(arguments, dict) and rest.lstrip()[end:].startswith(self.after)
        return ToolCall(name, arguments) if whole else None


def call_form(asked: str, called: str, special: Collection[str]) -> CallForm:
    """The form in which a template writes calls, from two prompts with the function `TRIED`: one in which the user has
    asked, and the same with a call of it and its result behind. `special` are the special tokens of the model. Raises
    InvalidInput naming `tools` where there is none that can be read.
    """
    if NAME not in asked or DOES not in asked:
        raise unfit("shows no functions")
    before, name, behind = called.removeprefix(asked).partition(NAME)
    found = _arguments(behind)
    if not called.startswith(asked) or not name or found is None or RESULT not in behind:
        raise unfit("writes no calls of functions as JSON, or not where an answer begins, or leaves out their results")
    start, end = found
    ends = [place for token in special if (place := behind.find(token, end)) >= 0]
    middle, after = behind[:start], behind[end : min(ends, default=end)]
    if not before.strip() or not middle or not ends or any(token in before + middle for token in special):
        raise unfit("writes calls of functions with special tokens, or without anything that marks them")
    return CallForm(before, middle, after)


def unfit(why: str) -> InvalidInput:
    """The error of a model that cannot call."""
    return InvalidInput("tools", f"cannot be called by this model, whose chat template {why}: leave it out")


def _arguments(text: str) -> tuple[int, int] | None:
    """Where the arguments begin and end, None where they are not there as JSON."""
    decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
    for start in (place for place, character in enumerate(text) if character == "{"):
        try:
            value, end = decode(text, start)
        except ValueError:
            continue
        if value == ARGUMENTS:
            return start, end
    return None
