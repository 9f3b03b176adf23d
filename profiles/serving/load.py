"""Loads: how requests are sent to a server, and what is observed of them.

In a closed load a number of clients each send their next request when the last one was answered. In an open load
requests arrive at random, so many a second, whether or not the server keeps up (Poisson arrivals; Schroeder,
Wierman and Harchol-Balter 2006, Open versus closed: a cautionary tale).

This file needs nothing but Python, so that a worker can run in a peer's own environment (profiles/protocol.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Final, TypedDict

CLOSED: Final = "closed"
OPEN: Final = "open"


@dataclass(frozen=True)
class Load:
    """`requests` requests, of so many clients or arriving at so many a second: `mode` says which `amount` is."""

    mode: str
    amount: float
    requests: int

    def __str__(self) -> str:
        return f"{self.mode} {self.amount:g} {self.requests}"

    @classmethod
    def parse(cls, line: str) -> Load:
        """The load that `str` wrote. Raises ValueError."""
        mode, amount, requests = line.split()
        if mode not in (CLOSED, OPEN):
            raise ValueError(f"a load is closed or open, not {mode}")
        return cls(mode, float(amount), int(requests))


class Observed(TypedDict):
    """What was observed of a load: `amount` is what all answers hold, such as tokens, and `seconds` the time from the
    first request to the last answer. `first` are the seconds to the first output of each answer, in an open load from
    its arrival. `refused` requests were not answered, as too many waited.
    """

    amount: float
    seconds: float
    first: list[float]
    refused: int


class Refused(Exception):
    """The server refused a request, as too many wait."""


Send = Callable[[int, Callable[[], None]], float]
"""Sends the request of a number, calls the function at the first output, and returns what the answer holds. Called by
several threads. Raises Refused.
"""


def observe(load: Load, send: Send, numbers: Iterator[int]) -> Observed:
    """Send the requests of a load, the next ones of `numbers`. Raises what `send` does."""
    begin = time.perf_counter()
    seeded = Random(0)  # noqa: S311 - every server gets the same arrivals
    arrivals = accumulate(seeded.expovariate(load.amount) for _ in range(load.requests))
    requests = [
        _Request(send, next(numbers), begin + arrival if load.mode == OPEN else None)
        for arrival in arrivals
    ]  # fmt: skip
    with ThreadPoolExecutor(int(load.amount) if load.mode == CLOSED else load.requests) as clients:
        answered = [amount for amount in clients.map(_Request.run, requests) if amount is not None]
    return Observed(
        amount=sum(answered),
        seconds=time.perf_counter() - begin,
        first=[request.first for request in requests if request.first is not None],
        refused=load.requests - len(answered),
    )


class _Request:
    """One request, sent when it arrives: at once where `arrival` is None."""

    def __init__(self, send: Send, number: int, arrival: float | None) -> None:
        self._send, self._number, self._arrival = send, number, arrival
        self.first: float | None = None

    def run(self) -> float | None:
        """Send it. Returns what the answer holds, None if it was refused."""
        began = time.perf_counter() if self._arrival is None else self._arrival
        time.sleep(max(0.0, began - time.perf_counter()))

        def output() -> None:
            if self.first is None:
                self.first = time.perf_counter() - began

        try:
            return self._send(self._number, output)
        except Refused:
            return None
