"""Limits how many operations of one client run at once."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Turns:
    """`async with turns(client):` waits until fewer than `most` blocks of that client run. Clients without a running
    block use no memory.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._semaphores: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def __call__(self, client: str) -> asyncio.Semaphore:
        semaphore = self._semaphores.get(client)
        if semaphore is None:
            semaphore = self._semaphores[client] = asyncio.Semaphore(self._most)
        return semaphore
