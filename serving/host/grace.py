"""Time that requests get to finish."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Grace:
    """Waits during a grace period. The server's own grace period ends all others."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    def begin(self, seconds: float) -> None:
        """The server stops: all grace periods end within this time."""
        asyncio.get_running_loop().call_later(seconds, self._over.set)

    async def wait(self, work: Coroutine[Any, Any, Any], seconds: float) -> bool:
        """Wait `seconds`, or less if the server stops, and return whether the work is done."""
        over, done = asyncio.create_task(self._over.wait()), asyncio.create_task(work)
        try:
            await asyncio.wait((over, done), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return done.done()
        finally:
            over.cancel()
            done.cancel()
