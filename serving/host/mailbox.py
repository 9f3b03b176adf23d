"""Passes the events of one request from the thread of its model to the event loop, with bounded memory."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from runtime import limits
from runtime.pipeline import Event, Progress
from serving.host.waking import WAKER, Reader


class Mailbox:
    """A queue of events. Made on the event loop that reads it; `put` and `end` may be called from any thread.

    Small events are all kept: their number is bounded by the request's steps and tokens. Unread pictures are limited to
    `limits.UNREAD_BYTES`: newer previews replace older ones, and a finished picture is refused while there is no room.
    `room` is called, from any thread, when there may be room again.
    """

    def __init__(self, room: Callable[[], None] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader: Reader | None = None
        self._lock = threading.Lock()
        self._room = room
        self._events: deque[Event] = deque()
        self._ended = False
        self._error: BaseException | None = None

    def put(self, event: Event) -> bool:
        """Add an event, and return whether it was taken. After `end` every event is taken and forgotten."""
        with self._lock:
            if not self._ended:
                if event.output and event.nbytes and self._full(event):
                    return False
                self._events.append(event)
                if event.nbytes:
                    self._thin()
                self._wake()
        return True

    def end(self, error: BaseException | None = None, at_once: bool = False) -> None:
        """End the queue: the reader gets the remaining events (none if `at_once`), then `error`. Only the first call
        counts.
        """
        with self._lock:
            if not self._ended:
                self._ended, self._error = True, error
                if at_once:
                    self._events.clear()
            self._wake()
        self._room()

    async def get(self) -> Event | None:
        """The next event, None at the end. Raises the error given to `end`."""
        while True:
            with self._lock:
                event = self._events.popleft() if self._events else None
                ended = self._ended
                if event is None and not ended:
                    reader = self._reader = self._loop.create_future()
            if event is not None:
                if event.nbytes:
                    self._room()
                return event
            if ended:
                if self._error is not None:
                    raise self._error
                return None
            await reader

    def _thin(self) -> None:
        """Leave out older previews while there is no room. The newest event stays as it is."""
        for i, old in enumerate(self._events):
            if not self._full():
                return
            if isinstance(old, Progress) and i < len(self._events) - 1:
                self._events[i] = replace(old, preview=None)

    def _full(self, further: Event | None = None) -> bool:
        held = sum(event.nbytes for event in self._events)
        return held > 0 and held + (further.nbytes if further else 0) > limits.UNREAD_BYTES.most

    def _wake(self) -> None:
        """Wake the reader, if it waits and nobody has woken it."""
        if self._reader is not None:
            WAKER.wake(self._reader)
            self._reader = None
