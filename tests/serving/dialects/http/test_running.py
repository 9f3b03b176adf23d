"""Requests of dialects: the first event before the response, errors in the middle, clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from runtime.errors import EnginecastError, NotFound, Unavailable
from runtime.language.text import Message
from runtime.pipeline import Event
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from serving.dialects.http.running import Begun, Stream, begun, collected, guarded, nanoseconds, now, run
from serving.host.job import Queued, Started
from tests.fakes.serving import FakeServer

QUESTION = ChatRequest((Message("user", ("what is it?",)),))


class Events:
    """Events of a request that fails where `error` is."""

    def __init__(self, *events: Event | Exception) -> None:
        self.given = events
        self.closed = False

    async def __call__(self) -> AsyncGenerator[Event, None]:
        try:
            for event in self.given:
                if isinstance(event, Exception):
                    raise event
                yield event
            await asyncio.sleep(0)
        finally:
            self.closed = True


def test_begins_with_the_first_output() -> None:
    events = Events(Queued(0), Started(), TextDelta("a"), TextDelta("b"))

    async def all_of() -> list[Event]:
        found = await begun(events())
        assert not events.closed
        return [event async for event in found]

    assert asyncio.run(all_of()) == [Queued(0), Started(), TextDelta("a"), TextDelta("b")]
    assert events.closed


def test_an_early_error_is_raised_before_the_response() -> None:
    events = Events(Queued(0), Started(), Unavailable("later"))
    with pytest.raises(Unavailable, match="later"):
        asyncio.run(begun(events()))
    assert events.closed


def test_closing_stops_the_request() -> None:
    events = Events(TextDelta("a"), TextDelta("b"))

    async def leave() -> None:
        found = await begun(events())
        await found.aclose()
        assert [event async for event in found] == []

    asyncio.run(leave())
    assert events.closed


async def lines(events: Begun) -> AsyncGenerator[str, None]:
    async for event in events:
        if isinstance(event, TextDelta):
            yield event.text


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (NotFound("it is gone"), "it is gone"),
        (RuntimeError("secret"), "the server failed unexpectedly: its log says why"),
    ],
)
def test_an_error_in_the_middle_is_the_last_piece(error: Exception, last: str) -> None:
    async def pieces() -> list[str]:
        found = await begun(Events(TextDelta("a"), error)())
        return [piece async for piece in guarded(lines(found), str)]

    assert asyncio.run(pieces()) == ["a", last]


def test_a_response_whose_client_left_before_it_began() -> None:
    events = Events(TextDelta("a"), TextDelta("b"))

    async def leave() -> None:
        async def send(event: object) -> None:
            raise asyncio.CancelledError

        response = Stream(await begun(events()), lines, str, "text/plain")
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(asyncio.CancelledError):
            await response(scope, None, send)
        assert events.closed

    asyncio.run(leave())


def test_one_answer_of_a_host(warm: FakeServer) -> None:
    async def answer() -> list[Event]:
        return await collected(run(warm.host, "talk", QUESTION))

    events = warm.do(answer())
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "a red círcle"
    assert [event.reason for event in events if isinstance(event, Finished)] == ["stop"]

    async def refused() -> Begun:
        return await begun(run(warm.host, "tolk", QUESTION))

    with pytest.raises(EnginecastError, match="did you mean 'talk'"):
        warm.do(refused())


def test_times() -> None:
    assert (nanoseconds(None), nanoseconds(0.25), nanoseconds(1e-9)) == (0, 250_000_000, 1)
    assert now().endswith("Z") and now()[10] == "T"
