"""Ends the process within seconds of SIGINT or SIGTERM, even during native code that runs for minutes.

Python's signal handlers run on the main thread between two bytecode instructions, so not while an engine compiles. The
C handler, however, writes the signal's number to a file descriptor at once (signal.set_wakeup_fd), and a second thread
reads it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, NoReturn

GRACE: Final = 2.0
"""Seconds that the main thread gets to clean up."""
AGAIN: Final = 0.1
"""Seconds after which a signal is sent again if the main thread has not handled it."""
STOPPING: Final = threading.Event()
"""Set when a signal has arrived: nothing more is printed then."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable(result: str = "nothing was written") -> Iterator[None]:
    """In this block, SIGINT and SIGTERM raise SystemExit(128 + number) on the main thread.

    The process ends with this code when the block has been left, or GRACE seconds later, without Python's own shutdown,
    which is slow with large libraries loaded. `runtime.files.vanishing` removes unfinished files even then. `result` is
    printed on standard error after the reason. Does nothing on other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handled = threading.Event()

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        handled.set()
        raise SystemExit(128 + number)

    # Signals of background jobs are ignored, and stay so.
    watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in watched}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, handled, result), daemon=True)
    watcher.start()
    try:
        yield
    except SystemExit as end:
        if handled.is_set() and isinstance(end.code, int):
            _end(end.code)
        raise
    finally:
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _end(code: int) -> NoReturn:
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _watch(reader: int, handled: threading.Event, result: str) -> None:
    """Wait for a signal, or for the end of the block, which closes the other end of the pipe."""
    number = next((received[0] for received in iter(lambda: os.read(reader, 1), b"") if received[0] in SIGNALS), None)
    if number is None:
        return
    STOPPING.set()
    reason = "interrupted" if number == signal.SIGINT else "terminated"
    sys.stderr.write("\n" * sys.stderr.isatty() + f"enginecast: {reason}: {result}\n")
    sys.stderr.flush()
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        time.sleep(AGAIN)
        if not handled.is_set():  # the signal arrived just before a blocking call and did not interrupt it
            signal.pthread_kill(threading.main_thread().ident or 0, number)
    _end(128 + number)
