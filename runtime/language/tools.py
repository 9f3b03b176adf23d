"""The functions that an answer may call, as a request says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from runtime import limits
from runtime.errors import InvalidInput, did_you_mean
from runtime.language.grammar import Grammar
from runtime.language.templates import is_unicode

FUNCTION: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Tool:
    """A function. `parameters` is the JSON schema of an object, which a call's arguments are. Raises InvalidInput."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def __post_init__(self) -> None:
        if not FUNCTION.fullmatch(self.name):
            raise InvalidInput("tools", f"has the name {self.name[:80]!r}, expected 1 to 64 letters, digits, _, . or -")
        try:
            Grammar.schema({"type": "object", **self.parameters})
        except InvalidInput as error:
            raise InvalidInput("tools", f"has {self.name}, whose schema of parameters {error.reason}") from None
        if self.parameters.get("type", "object") != "object":
            raise InvalidInput("tools", f"has {self.name}, whose parameters are no object: the schema needs that type")

    @property
    def spec(self) -> dict[str, Any]:
        """The function as chat templates take it."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}


@dataclass(frozen=True)
class Toolbox:
    """The functions that an answer may call, one of them at most; with `must` the answer is a call, with `only` a call
    of the function of this name. Raises InvalidInput.
    """

    tools: tuple[Tool, ...]
    must: bool = False
    only: str = ""

    def __post_init__(self) -> None:
        if not self.tools:
            raise InvalidInput("tools", "is empty, expected one function or more")
        limits.TOOLS.length("tools", self.tools)
        text = json.dumps([tool.spec for tool in self.tools], ensure_ascii=False)
        limits.TEXT.length("tools", text)
        if not is_unicode(text):
            raise InvalidInput("tools", "holds half a surrogate pair, which is no Unicode text")
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise InvalidInput("tools", "has two functions of one name: give each its own")
        if self.only and self.only not in names:
            raise InvalidInput("tool_choice", f"names no function of tools: {did_you_mean(self.only, names)}")

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(tool for tool in self.tools if self.only in ("", tool.name))
