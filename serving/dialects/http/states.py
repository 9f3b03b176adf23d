"""What becomes of each field of a request: said beside the field, enforced from there, and listed in docs/clients.md.

A dialect's messages are subclasses of `Body`. A field works, unless its annotation says otherwise:

    class Chat(Body):
        model: str
        user: Annotated[str | None, NoEffect("clients are told apart by their tokens")] = None
        tools: Annotated[list[Any] | None, Refused("models here call no tools", but=([],))] = None

Fields that are not declared are refused as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function
from starlette.routing import BaseRoute, WebSocketRoute

from runtime.language.templates import is_unicode

WORKS: Final = "yes"


class Body(BaseModel):
    """Base class of the messages that clients send. Numbers are numbers, not texts of them; texts are Unicode."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _unicode(cls, value: Any) -> Any:
        _check_unicode(value)
        return value


def _check_unicode(value: Any) -> None:
    """Refuse texts with half a surrogate pair, which JSON can write, also in what holds texts."""
    waiting = [value]
    while waiting:  # a value may be as deep as the stack
        match one := waiting.pop():
            case str() if not is_unicode(one):
                raise PydanticCustomError("surrogate", "holds half a surrogate pair, which is no Unicode text")
            case dict():
                waiting += (*one, *one.values())
            case list():
                waiting += one


@dataclass(frozen=True)
class NoEffect:
    """Of a field that is accepted because clients send it, though it changes nothing here. `why` says so."""

    why: str
    state = "no effect"


@dataclass(frozen=True)
class Refused:
    """Of a field with a meaning that cannot be given here: every value is refused except None and those in `but`.
    `why` says it, and what to do instead.
    """

    why: str
    but: tuple[Any, ...] = ()
    state = "refused"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value is not None and not any(type(value) is type(one) and value == one for one in self.but):
            raise PydanticCustomError("refused", "{why}", {"why": self.why})
        return value


@dataclass(frozen=True)
class Row:
    """A field of an endpoint, such as "messages[].role" of "POST /v1/chat/completions", and its state. `field` is empty
    in the row of the endpoint itself. `why` is empty where it works.
    """

    endpoint: str
    field: str = ""
    state: str = WORKS
    why: str = ""


def rows(routes: Sequence[BaseRoute]) -> list[Row]:
    """The rows of all endpoints of a dialect, in the order of their declaration."""
    found: dict[Row, None] = {}  # messages of one place may have fields of one name
    for route in routes:
        if isinstance(route, WebSocketRoute):
            found[Row(f"WebSocket {route.path}")] = None
        else:
            assert isinstance(route, APIRoute), "a router in a router hides its endpoints"
            for verb in sorted(route.methods or ()):
                found |= dict.fromkeys(_endpoint(f"{verb} {route.path_format}", route))
    return list(found)


def _endpoint(endpoint: str, route: APIRoute) -> Iterator[Row]:
    yield Row(endpoint)
    for parameter in route.dependant.query_params:
        yield _row(endpoint, parameter.alias, parameter.field_info.metadata)
    for parameter in route.dependant.body_params:
        yield from _fields(endpoint, parameter.field_info.annotation, "")


def _fields(endpoint: str, annotation: Any, prefix: str) -> Iterator[Row]:
    """The rows of the fields of every message in an annotation, and of the messages in these."""
    for message, place in _messages(annotation, prefix):
        for name, field in message.model_fields.items():
            path = f"{place}{field.alias or name}"
            row = _row(endpoint, path, field.metadata)
            yield row
            if row.state == WORKS:
                yield from _fields(endpoint, field.annotation, path)


def _messages(annotation: Any, place: str) -> Iterator[tuple[type[Body], str]]:
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation, f"{place}." if place else ""
        return
    listed = getattr(annotation, "__origin__", None) is list
    for inner in get_args(annotation):
        yield from _messages(inner, f"{place}[]" if listed else place)


def _row(endpoint: str, field: str, metadata: Sequence[Any]) -> Row:
    found = next((one for one in metadata if isinstance(one, NoEffect | Refused)), None)
    return Row(endpoint, field) if found is None else Row(endpoint, field, found.state, found.why)
