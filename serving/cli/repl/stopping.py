"""Ctrl-C while a request runs stops the request, not the program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from runtime.errors import Cancelled
from serving.dialects.python.stream import Stream

R = TypeVar("R")


class Stopped(KeyboardInterrupt):
    """Ctrl-C stopped a request."""


@contextmanager
def stopping(begin: Callable[[], Stream[R]]) -> Iterator[Stream[R]]:
    """Send a request: `begin` returns its stream. In this block, on the main thread, Ctrl-C cancels the stream before
    its next step, and Stopped is raised once it has ended. Ctrl-C again raises KeyboardInterrupt at once. A process
    that ignores SIGINT goes on to.
    """
    pressed, stream = False, None
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield begin()
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        if stream is not None:
            stream.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        stream = begin()
        if pressed:  # while the request was on its way
            stream.cancel()
        yield stream
    except Cancelled:
        if pressed:
            raise Stopped from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
