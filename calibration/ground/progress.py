"""How far long work is, for whoever listens: a loop wrapped in `each` reports where it is, without listeners being
passed to it.

    with listening(print):
        for call in each("call", calls):        # share 0.0, "call 1 of 24", ...
            for tensor in each("tensor", call): # share 0.02, "call 1 of 24, tensor 3 of 50", ...

Where nobody listens, `each` only yields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from runtime.pipeline import Event, Progress
from runtime.tasks.chat import TextDelta

T = TypeVar("T")
Listener = Callable[["Position"], None]


class Position(NamedTuple):
    """`share` of the work that is done, 0 to 1; `free` is the part of it that took no time, as an earlier run had done
    it.
    """

    share: float
    free: float
    text: str


@dataclass
class _Meter:
    """The intervals of the work that the running loops stand for, outermost first, and what each says."""

    listen: Listener
    places: list[tuple[float, float, str]] = field(default_factory=lambda: [(0.0, 1.0, "")])
    free: float = 0.0

    @contextmanager
    def inside(self, start: float, end: float, text: str) -> Iterator[None]:
        depth = len(self.places)
        low, high, _ = self.places[-1]
        self.places.append((low + (high - low) * start, low + (high - low) * end, text))
        self.tell()
        try:
            yield
        finally:
            del self.places[depth:]

    def tell(self) -> None:
        self.listen(Position(self.places[-1][0], self.free, ", ".join(text for _, _, text in self.places if text)))


_METER: Final[ContextVar[_Meter | None]] = ContextVar("meter", default=None)


@contextmanager
def listening(listen: Listener) -> Iterator[None]:
    """Inside, loops of this thread report to `listen`."""
    token = _METER.set(_Meter(listen))
    try:
        yield
    finally:
        _METER.reset(token)


def each(what: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items, each reported as "`what` number of total" before it is yielded. `total` is their number where they
    have no length.
    """
    if total is None:
        assert isinstance(items, Collection), "items without a length come with a total"
        total = len(items)
    for number, item in enumerate(items):
        with at(what, number + 1, total):
            yield item


@contextmanager
def at(what: str, number: int, total: int) -> Iterator[None]:
    """Inside, the work is at `what` number `number`, from 1, of `total`."""
    with phase((number - 1) / total, number / total, f"{what} {number} of {total}"):
        yield


@contextmanager
def phase(start: float, end: float, text: str = "") -> Iterator[None]:
    """Inside, the work goes from the share `start` of what surrounds it to the share `end`."""
    meter = _METER.get()
    if meter is None:
        yield
        return
    with meter.inside(min(start, 1.0), min(end, 1.0), text):
        yield


def reached(share: float, text: str) -> None:
    """The work has come to `share` of what surrounds it."""
    with phase(share, share, text):
        pass


def followed(events: Iterable[Event], tokens: int = 0) -> Iterator[Event]:
    """A pipeline's events; its steps, or the tokens of an answer of at most `tokens`, say how far it is."""
    made = 0
    for event in events:
        if isinstance(event, Progress):
            reached(event.step / event.total, f"step {event.step} of {event.total}")
        elif isinstance(event, TextDelta) and tokens:
            made += 1
            reached(made / tokens, f"token {made} of at most {tokens}")
        yield event


def reused() -> None:
    """What is being done now took no time: an earlier run had done it. It then does not count where the time left is
    estimated.
    """
    meter = _METER.get()
    if meter is not None:
        low, high, _ = meter.places[-1]
        meter.free += high - low
