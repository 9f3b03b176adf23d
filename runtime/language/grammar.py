"""What a request says of the form of its answers: a JSON schema or a regular expression that they match."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language.templates import is_unicode

Kind = Literal["json_schema", "regex"]
ANY_OBJECT: Final = '{"type": "object"}'
OWN_KEY: Final = "x-guidance"
"""Where llguidance reads options of its own from a schema. Some of them switch parts of the schema off."""


@dataclass(frozen=True)
class Grammar:
    """The form of an answer, as `text`: of the kind "json_schema" a JSON schema, which the answer is a value of; of the
    kind "regex" a regular expression, which the whole answer matches.

    Schemas are read as draft 2020-12, regular expressions in the syntax of Rust's regex, without look-around and
    references. Raises InvalidInput for a text that is none or is above a limit. What a schema asks for is checked where
    the model is.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidInput("grammar", f"is a '{self.kind}', expected {' or '.join(get_args(Kind))}")
        limits.GRAMMAR.length("grammar", self.text)
        if not self.text:
            raise InvalidInput("grammar", "is empty, expected a JSON schema or a regular expression")
        if not is_unicode(self.text):
            raise InvalidInput("grammar", "holds half a surrogate pair, which is no Unicode text")
        if self.kind == "json_schema":
            _check_schema(self.text)

    @classmethod
    def json(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_schema", ANY_OBJECT)

    @classmethod
    def schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """A value of this JSON schema, given as its text or as what that text stands for. Raises InvalidInput."""
        if isinstance(schema, str):
            return cls("json_schema", schema)
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput("grammar", f"is no JSON schema: {error}") from None

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that the pattern matches from beginning to end."""
        return cls("regex", pattern)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("grammar", f"is no JSON schema: it cannot be read as JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidInput("grammar", f"is no JSON schema: expected a JSON object, such as {ANY_OBJECT}")
    if OWN_KEY in schema:
        raise InvalidInput("grammar", f"has the key '{OWN_KEY}', which is not of JSON schema: leave it out")
    limits.GRAMMAR_DEPTH.count("grammar", _depth(schema))


def _depth(value: object) -> int:
    """How many arrays and objects of a JSON value lie in each other."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
