"""A running request: one implementation for callers that wait, that iterate and that use asyncio.

The work is a generator of events. It advances only when the next event is requested. Under asyncio it advances in its
own thread, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Generic, TypeVar

from runtime.pipeline import Event, Progress

R = TypeVar("R")


class Stream(Generic[R]):
    """The events of one request, and its result.

    | Way | Events | Result |
    |---|---|---|
    | blocking | `for event in stream` | `stream.result()` |
    | asyncio | `async for event in stream` | `await stream` |

    Events are `Queued` (Client only), `Started` (a loaded bundle only), `Progress` and `ImageReady` of pictures,
    `TextDelta` and `Finished` of answers, `Embeddings` or `Scores` of embedding models, and last `Done`. Iterating
    raises the errors of the request.

    Leaving a `with` or `async with` block, `close()`, and cancelling a task that waits for an event stop the work
    before the next denoising step or token. `cancel()` does the same from any thread: a thread that waits for the next
    event raises `Cancelled`.
    """

    def __init__(
        self,
        events: Generator[Event, None, None],
        cancel: Callable[[], None],
        collect: Callable[[Sequence[Event]], R],
    ) -> None:
        self._events = events
        self._stop = cancel
        self._collect = collect
        self._seen: list[Event] = []
        self._ended = False

    def __iter__(self) -> Stream[R]:
        return self

    def __next__(self) -> Event:
        event = self._advance()
        if event is None:
            raise StopIteration
        return event

    def __enter__(self) -> Stream[R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self) -> R:
        """Wait for the rest and return the result. Raises the errors of the request; Cancelled after `close`."""
        for _ in self:
            pass
        return self._collect(self._seen)

    def cancel(self) -> None:
        """Stop the work before its next step. May be called from any thread, any number of times."""
        self._stop()

    def close(self) -> None:
        """Stop the work and free its resources. No other thread may be waiting for an event."""
        self.cancel()
        self._events.close()

    def __aiter__(self) -> Stream[R]:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        step = asyncio.get_running_loop().run_in_executor(self._thread, self._advance)
        try:
            await asyncio.wait({step})
        except asyncio.CancelledError:
            await self.aclose()
            if not step.cancelled():
                step.exception()  # marks the exception as seen: the caller was cancelled
            raise
        event = step.result()
        if event is None:
            await self.aclose()
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> Stream[R]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __await__(self) -> Generator[object, None, R]:
        return self._gathered().__await__()

    async def aclose(self) -> None:
        """Stop the work, and return when its last step has ended: at most one denoising step or token later."""
        self.cancel()
        await asyncio.to_thread(self._end)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """Advances the work under asyncio, always in the same thread: some engines require that."""
        return ThreadPoolExecutor(1, "enginecast")

    def _advance(self) -> Event | None:
        event = next(self._events, None)
        if event is not None:
            self._seen.append(replace(event, preview=None) if isinstance(event, Progress) else event)
        return event

    def _end(self) -> None:
        """Wait for the current step, then close."""
        self._ended = True
        self._thread.shutdown()
        self._events.close()

    async def _gathered(self) -> R:
        async for _ in self:
            pass
        return self._collect(self._seen)
