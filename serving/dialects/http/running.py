"""Runs the requests of dialects: as one answer, or as a stream whose early errors still have a status."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, Final

from starlette.responses import StreamingResponse

from runtime.errors import EnginecastError
from runtime.pipeline import Event
from runtime.task import Request
from serving.dialects.grpc.status import UNEXPECTED
from serving.dialects.http import errors
from serving.host.job import Queued, Started
from serving.host.models import ModelHost
from serving.host.observing import current_client
from serving.host.terms import Terms

log = logging.getLogger(__name__)

NANOSECONDS: Final = 1_000_000_000
Lines = AsyncGenerator[str, None]


class Begun:
    """The events of a request of which something is there already, from the first on. `aclose` stops the request."""

    def __init__(self, held: deque[Event], rest: AsyncGenerator[Event, None]) -> None:
        self._held = held
        self._rest = rest

    def __aiter__(self) -> Begun:
        return self

    async def __anext__(self) -> Event:
        return self._held.popleft() if self._held else await anext(self._rest)

    async def aclose(self) -> None:
        self._held.clear()
        await self._rest.aclose()


def run(
    host: ModelHost, model: str, request: Request, terms: Terms | None = None, timeout: float | None = None
) -> AsyncGenerator[Event, None]:
    """The events of a request of the client whose call this is. Raises the errors of `ModelHost.run`."""
    return host.run(model, request, timeout, current_client(), terms)


async def collected(events: AsyncGenerator[Event, None]) -> list[Event]:
    """Every event of a request. Cancelling stops the request."""
    async with aclosing(events):
        return [event async for event in events]


async def begun(events: AsyncGenerator[Event, None]) -> Begun:
    """Wait until a request does more than wait and start, or fails: from then on its response may begin."""
    held: deque[Event] = deque()
    try:
        async for event in events:
            held.append(event)
            if not isinstance(event, Queued | Started):
                break
    except BaseException:
        await events.aclose()
        raise
    return Begun(held, events)


class LineStream(StreamingResponse):
    """A response in `lines`. If they fail, the last one is what `failure` makes of the error. They are closed when the
    client leaves.
    """

    def __init__(self, lines: Lines, failure: Callable[[EnginecastError], str], media_type: str) -> None:
        self._lines = guarded(lines, failure)
        super().__init__(self._lines, media_type=media_type, headers={"cache-control": "no-store"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._lines):
            await super().__call__(scope, receive, send)


class Stream(LineStream):
    """A response in pieces, made of the events of a request by `lines`. When the client leaves, the request is stopped,
    even if the response has not begun.
    """

    def __init__(
        self,
        events: Begun,
        lines: Callable[[Begun], Lines],
        failure: Callable[[EnginecastError], str],
        media_type: str,
    ) -> None:
        self._events = events
        super().__init__(lines(events), failure, media_type)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def guarded(lines: Lines, failure: Callable[[EnginecastError], str]) -> Lines:
    """The pieces of a response; of an error, which is noted in the call's record, what `failure` makes of it."""
    try:
        async with aclosing(lines):
            async for line in lines:
                yield line
    except EnginecastError as error:
        errors.note(error)
        yield failure(error)
    except Exception:
        log.exception("a request failed unexpectedly")
        unexpected = EnginecastError(UNEXPECTED)
        errors.note(unexpected)
        yield failure(unexpected)


def nanoseconds(seconds: float | None) -> int:
    """A duration in nanoseconds, 0 for none."""
    return round((seconds or 0.0) * NANOSECONDS)


def now() -> str:
    """The time, as RFC 3339 writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
