"""Wakes readers on event loops for threads that compute.

`call_soon_threadsafe` writes to a socket and gives up Python's global lock meanwhile. The woken loop takes it, and the
thread of a model would wait until the loop has sent its token before it could make its next call. A thread of its own
therefore does the waking: it gets the lock when the model's thread is in an engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

Reader = asyncio.Future[None]
"""What a coroutine waits for."""


class Waker:
    """One for the whole process. Its thread starts when it is first needed."""

    def __init__(self) -> None:
        self._readers: SimpleQueue[Reader] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def wake(self, reader: Reader) -> None:
        """Complete what a reader waits for, on its event loop. May be called from any thread, and does not wait."""
        self._readers.put(reader)
        if self._thread is None or not self._thread.is_alive():  # it does not live on in a process that was forked
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="waker", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            ready = [self._readers.get()]
            with suppress(Empty):
                while True:
                    ready.append(self._readers.get_nowait())
            readers = defaultdict[asyncio.AbstractEventLoop, list[Reader]](list)
            for reader in ready:
                readers[reader.get_loop()].append(reader)
            for loop, some in readers.items():
                with suppress(RuntimeError):  # it is closed, and nobody waits on it any more
                    loop.call_soon_threadsafe(_complete, some)
            del ready, readers, reader, loop, some


def _complete(readers: list[Reader]) -> None:
    for reader in readers:
        if not reader.done():
            reader.set_result(None)


WAKER: Final = Waker()
