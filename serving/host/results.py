"""Results of requests that go on when their client leaves: kept for a while, for whoever knows the id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from runtime import limits
from runtime.errors import NotFound, ResourceExhausted, quoted
from runtime.pipeline import Event, Progress


class Result:
    """The events of a request of one task so far, of the previews the last one."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.events: list[Event] = []
        self.ended = False
        self.error: Exception | None = None
        self._shown: tuple[int, Progress] | None = None
        self._more = asyncio.Event()

    @property
    def nbytes(self) -> int:
        """Bytes of its pictures."""
        return sum(event.nbytes for event in self.events)

    def add(self, event: Event) -> None:
        """Hold a further event."""
        if isinstance(event, Progress):
            if self._shown is not None:
                number, shown = self._shown
                self.events[number] = replace(shown, preview=None)
            self._shown = None if event.preview is None else (len(self.events), event)
        self.events.append(event)
        self._tell()

    def end(self, error: Exception | None = None) -> None:
        """There are no more events."""
        self.ended, self.error = True, error
        self._tell()

    async def follow(self) -> AsyncGenerator[Event, None]:
        """All events from the first on, those to come included. Raises the error of the request."""
        seen = 0
        while True:
            more = self._more
            while seen < len(self.events):
                seen += 1
                yield self.events[seen - 1]
            if self.ended:
                if self.error is not None:
                    raise self.error
                return
            await more.wait()

    def _tell(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


class Results:
    """The results of a host, by id. One that was read to its end, or not for `limits.RESULT_SECONDS`, is dropped; all
    together hold at most `limits.RESULT_BYTES`, the oldest ended ones are dropped for others.
    """

    def __init__(self) -> None:
        self._held: dict[str, Result] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def kept(self, id: str, task: str, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Read the events of a request to their end, even if nobody reads what this yields."""
        self._held[id] = Result(task)
        reading = asyncio.create_task(self._read(id, events))
        self._tasks.add(reading)
        reading.add_done_callback(self._tasks.discard)
        async with aclosing(self.collect(id, task)) as found:
            async for event in found:
                yield event

    async def collect(self, id: str, task: str) -> AsyncGenerator[Event, None]:
        """The events of a request of this task, from the first on. Raises NotFound and the error of the request."""
        result = self._held.get(id)
        if result is None or result.task != task:
            raise NotFound(
                f"there is no result {quoted(id)}: it was read, it is older than {limits.RESULT_SECONDS.most} s, or no "
                "request of this service has this id"
            )
        async with aclosing(result.follow()) as events:
            async for event in events:
                yield event
        self._held.pop(id, None)

    async def _read(self, id: str, events: AsyncGenerator[Event, None]) -> None:
        result = self._held[id]
        try:
            async with aclosing(events):
                async for event in events:
                    self._make_room(event.nbytes)
                    result.add(event)
            result.end()
        except Exception as error:  # it is raised again for whoever reads the result
            result.end(error)
        asyncio.get_running_loop().call_later(limits.RESULT_SECONDS.most, self._held.pop, id, None)

    def _make_room(self, nbytes: int) -> None:
        """Drop ended results until there is room. Raises ResourceExhausted."""
        while nbytes and nbytes + sum(result.nbytes for result in self._held.values()) > limits.RESULT_BYTES.most:
            oldest = next((id for id, result in self._held.items() if result.ended), None)
            if oldest is None:
                raise ResourceExhausted(
                    "results that wait to be collected take all the memory there is for them: collect them, or let "
                    "requests end when their client leaves"
                )
            del self._held[oldest]
