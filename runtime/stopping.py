"""An end within seconds of SIGINT or SIGTERM, also out of native code that does not return to Python for minutes.

Python's own handlers run on the main thread between two of its instructions: not while an engine compiles or a large
product is computed. The C handler, however, writes the signal's number to a file descriptor at once, and a thread that
waits for that needs no other one.
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
"""Seconds that the main thread gets to leave what it does in order."""
AGAIN: Final = 0.1
"""Seconds after which a signal that the main thread has not seen is sent to it again."""
STOPPING: Final = threading.Event()
"""Set once a signal has come: nothing more is to be printed."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable(result: str = "nothing was written") -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise SystemExit(128 + number) on the main thread.

    The process ends with this code once that has left the block, or GRACE seconds later if it has not: Python's own way
    out takes longer than all the rest where large libraries are loaded. What then lies half done is left to the
    janitors of `runtime.files.vanishing`. `result` is said on standard error, after the reason. On another thread than
    the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = threading.Event()

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        heard.set()
        raise SystemExit(128 + number)

    heeded = [
        number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    ]  # as of jobs in the background
    before = {number: signal.signal(number, leave) for number in heeded}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, heard, result), daemon=True)
    watcher.start()
    try:
        yield
    except SystemExit as end:
        if heard.is_set() and isinstance(end.code, int):
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


def _watch(reader: int, heard: threading.Event, result: str) -> None:
    """Wait for a signal, or for the end of what is watched, which closes the other end of the pipe."""
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
        if not heard.is_set():  # it came just before a call that waits, and did not interrupt it
            signal.pthread_kill(threading.main_thread().ident or 0, number)
    _end(128 + number)
