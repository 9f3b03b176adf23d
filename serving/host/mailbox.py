"""Passes the events of one request from a worker thread to the event loop, with bounded memory."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import replace

from runtime import limits
from runtime.pipeline import Event, Progress


class Mailbox:
    """A queue of events. Made on the event loop that reads it; `put` and `end` may be called from any thread.

    Small events are all kept: their number is bounded by the request's steps and tokens. Unread pictures are limited to
    `limits.UNREAD_BYTES`: newer previews replace older ones, and `put` blocks until a finished picture fits.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._room = threading.Condition()
        self._events: deque[Event] = deque()
        self._ended = False
        self._error: BaseException | None = None

    def put(self, event: Event) -> None:
        """Add an event. Does nothing after `end`."""
        with self._room:
            if event.output and event.nbytes:
                self._room.wait_for(lambda: self._ended or not self._full(event))
            if self._ended:
                return
            self._events.append(event)
            for i, old in enumerate(self._events):
                if not self._full():
                    break
                if isinstance(old, Progress) and old is not event:
                    self._events[i] = replace(old, preview=None)
        self._wake()

    def end(self, error: BaseException | None = None, at_once: bool = False) -> None:
        """End the queue: the reader gets the remaining events (none if `at_once`), then `error`. Only the first call
        counts.
        """
        with self._room:
            if not self._ended:
                self._ended, self._error = True, error
                if at_once:
                    self._events.clear()
            self._room.notify_all()
        self._wake()

    async def get(self) -> Event | None:
        """The next event, None at the end. Raises the error given to `end`."""
        while True:
            self._arrived.clear()
            with self._room:
                if self._events:
                    event = self._events.popleft()
                    self._room.notify_all()
                    return event
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return None
            await self._arrived.wait()

    def _full(self, further: Event | None = None) -> bool:
        held = sum(event.nbytes for event in self._events)
        return held > 0 and held + (further.nbytes if further else 0) > limits.UNREAD_BYTES.most

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._arrived.set)
