"""What becomes of each field of the HTTP dialects: enforced as it is declared, listed in docs/clients.md, proved."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from fastapi import APIRouter
from pydantic import ValidationError

from serving.dialects.http.dialect import Dialect, dialects
from serving.dialects.http.errors import refusal
from serving.dialects.http.states import WORKS, Body, NoEffect, Refused, Row, rows
from tests.fakes.proofs import PAGE, TESTS, fields, proofs, written


class Part(Body):
    kind: Literal["text"] = "text"
    text: str


class Thing(Body):
    parts: list[Part]
    scale: float = 1.0
    names: dict[str, Any] | None = None
    user: Annotated[str | None, NoEffect("nobody asks")] = None
    tools: Annotated[list[Any] | None, Refused("there are none", but=([],))] = None
    zero: Annotated[int, Refused("it is 0", but=(0,))] = 0


@pytest.mark.parametrize(
    "sent, why",
    [
        ({"parts": [{"text": "x"}], "user": "me", "tools": [], "scale": 2}, ""),
        ({"parts": [], "tools": [1]}, "tools: there are none"),
        ({"parts": [], "zero": 1}, "zero: it is 0"),
        ({"parts": [], "zero": False}, "zero: input should be a valid integer"),
        ({"parts": [], "size": 1}, "size: is not known here: leave it out"),
        ({"parts": [], "scale": "2"}, "scale: input should be a valid number"),
        ({"parts": [], "scale": float("nan")}, "scale: input should be a finite number"),
        ({"parts": [{"text": "x"}, {"text": 1}]}, "parts[1].text: input should be a valid string"),
        ({"parts": [{"text": "\ud800"}]}, "parts[0].text: holds half a surrogate pair"),
        ({"parts": [], "names": {"a": ["\ud800"]}}, "names: holds half a surrogate pair"),
    ],
)
def test_states_are_enforced(sent: Any, why: str) -> None:
    if not why:
        Thing.model_validate(sent)
        return
    with pytest.raises(ValidationError) as caught:
        Thing.model_validate(sent)
    found: dict[str, Any] = dict(caught.value.errors()[0])
    assert str(refusal(found | {"loc": ("body", *found["loc"])})).startswith(why)


def test_rows_have_every_field() -> None:
    routes = APIRouter()

    @routes.post("/things")
    async def things(thing: Thing, dry: bool = False) -> None: ...

    @routes.websocket("/news")
    async def news() -> None: ...

    found = rows(routes.routes)
    assert [(row.field, row.state) for row in found if row.endpoint == "POST /things"] == [
        ("", WORKS),
        ("dry", WORKS),
        ("parts", WORKS),
        ("parts[].kind", WORKS),
        ("parts[].text", WORKS),
        ("scale", WORKS),
        ("names", WORKS),
        ("user", "no effect"),
        ("tools", "refused"),
        ("zero", "refused"),
    ]
    assert found[-1] == Row("WebSocket /news")


def test_the_page_has_every_field() -> None:
    page = PAGE.read_text()
    assert page == written(page), "write it with: python -m tests.fakes.proofs"


@pytest.mark.parametrize("dialect", dialects(), ids=lambda dialect: dialect.name)
def test_everything_that_works_has_a_test(dialect: Dialect) -> None:
    works = {(row.endpoint, row.field) for row in fields(dialect) if row.state == WORKS}
    proved = set(proofs(TESTS / dialect.name))
    assert not works - proved, "no test is marked with proves(...) for these"
    assert not proved - works, "tests are marked for fields that are not declared as working"
