"""What a host reports while it works. Metrics, traces and logs are `Observer`s; nothing here needs their libraries.

A dialect makes a `Record` for each call of a client and opens it with `recorded`. `ModelHost.run` fills the open record
in. A record holds no text and no picture of a request.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from runtime.pipeline import Event
from serving.host.job import Done, EngineUse, Queued, Started
from serving.host.states import ModelState, Status

OK: Final = "OK"
OWN: Final = ("requests", "failed", "runs", "calls", "run_seconds")
"""What `Counts` counts besides `Event.counts`."""

Statuses = Callable[[], Sequence[Status]]


@dataclass(eq=False)
class Record:
    """One call of a client. `id` names it in logs, `method` is the dialect's name of what it calls, such as
    "enginecast.v1.ImageService/Generate", and `client` who sent it: the name of a token, that in a certificate, or the
    address `peer`. `request` is what a management call requested, as JSON. `traceparent` is the client's span (W3C
    Trace Context), "" without one.

    `arrived` is in seconds since the epoch. Other times are in seconds after the arrival, None if that never happened.
    `model` and `task` are those of a model that this server has. `code` is the name of a gRPC status, `error` the class
    of the error. `counts` sums up `Event.counts`.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    client: str = ""
    traceparent: str = ""
    peer: str = ""
    request: str = ""
    arrived: float = field(default_factory=time.time)
    model: str = ""
    task: str = ""
    queued: float | None = None
    started: float | None = None
    first_output: float | None = None
    ended: float | None = None
    code: str = OK
    error: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    engines: tuple[EngineUse, ...] = ()
    _began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """The time since the arrival."""
        return time.perf_counter() - self._began

    @property
    def waited(self) -> float | None:
        """Seconds in the queue, None if the request did not start."""
        return None if self.queued is None or self.started is None else self.started - self.queued

    def add(self, event: Event) -> None:
        """Note what an event of the request says."""
        match event:
            case Queued() if self.queued is None:
                self.queued = self.seconds
            case Started():
                self.started = self.seconds
            case Done():
                self.engines = event.engines
        if event.output and self.first_output is None:
            self.first_output = self.seconds
        self.counts.update(event.counts)


class Observer:
    """Is called with everything that happens on a host. Each method does nothing by default.

    `ran` may be called from any thread, the others from the event loop. No method may block or raise.
    """

    def watch(self, statuses: Statuses) -> None:
        """A host begins. On its event loop, `statuses` gives the status of every model."""

    def event(self, record: Record, event: Event) -> None:
        """A request has an event: Queued when it was admitted, Started, those of its pipeline, Done. The record has
        noted it.
        """

    def ended(self, record: Record) -> None:
        """A call of a client ended, refused ones included."""

    def ran(self, model: str, submodel: str, calls: int, seconds: float) -> None:
        """An engine ran once, for `calls` calls of pipelines together, in so many seconds."""

    def changed(self, model: str, state: ModelState) -> None:
        """A model has another state."""


class Observers(Observer):
    """Passes everything on to several observers, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def watch(self, statuses: Statuses) -> None:
        for observer in self._observers:
            observer.watch(statuses)

    def event(self, record: Record, event: Event) -> None:
        for observer in self._observers:
            observer.event(record, event)

    def ended(self, record: Record) -> None:
        for observer in self._observers:
            observer.ended(record)

    def ran(self, model: str, submodel: str, calls: int, seconds: float) -> None:
        for observer in self._observers:
            observer.ran(model, submodel, calls, seconds)

    def changed(self, model: str, state: ModelState) -> None:
        for observer in self._observers:
            observer.changed(model, state)


class Counts(Observer):
    """Counts since the start of the server, by model and name: those of OWN, which are "requests" that ended, "failed"
    ones of them, "runs" of engines, the "calls" in them and their "run_seconds", and `Event.counts`.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def of(self, model: str) -> dict[str, float]:
        """The counts of a model."""
        with self._lock:
            return dict(self._counts[model])

    def event(self, record: Record, event: Event) -> None:
        self._add(record.model, event.counts)

    def ended(self, record: Record) -> None:
        if record.model:
            self._add(record.model, {"requests": 1, "failed": record.code != OK})

    def ran(self, model: str, submodel: str, calls: int, seconds: float) -> None:
        self._add(model, {"runs": 1, "calls": calls, "run_seconds": seconds})

    def _add(self, model: str, counts: Mapping[str, float]) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[model][name] += count


_current: ContextVar[Record | None] = ContextVar("record", default=None)


def current() -> Record | None:
    """The record of the call that this task or thread works for."""
    return _current.get()


def current_client() -> str:
    """Who sent the call that this task or thread works for; "" outside of calls."""
    record = current()
    return record.client if record else ""


@contextmanager
def recorded(record: Record, observer: Observer) -> Iterator[Record]:
    """Makes a record the current one, and reports its end. Who opens it sets `code` and `error` before."""
    token = _current.set(record)
    try:
        yield record
    finally:
        record.ended = record.seconds
        _current.reset(token)
        observer.ended(record)


async def observed(
    events: AsyncGenerator[Event, None], observer: Observer, model: str, task: str
) -> AsyncGenerator[Event, None]:
    """The events of a request on a model, noted in the current record; "" for a model that is unknown."""
    record = current() or Record()
    record.model, record.task = model, task
    async with aclosing(events):
        async for event in events:
            record.add(event)
            observer.event(record, event)
            yield event
