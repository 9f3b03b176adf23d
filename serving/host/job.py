"""One request on one model: its pipeline, its clock and its way to stop. Knows no thread, no event loop and no
protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from runtime.engine import Engine
from runtime.errors import EnginecastError
from runtime.pipeline import Call, Engines, Event, Outputs, Pipeline

Driver = Callable[[Pipeline, Engines], Generator[Event, None, None]]
"""Runs a pipeline's calls and yields its events: `runtime.pipeline.drive`, or one that batches the calls of several
jobs.
"""


class Model(Protocol):
    """What a job needs of a loaded model (`runtime.placing.loading.LoadedModel`)."""

    @property
    def task(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def engines(self) -> Mapping[str, Engine]: ...
    @property
    def pipeline(self) -> Callable[[Any], Pipeline]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    def close(self) -> None: ...
    def broken(self) -> Sequence[str]: ...
    def elsewhere(self, broken: Sequence[str], /) -> Model: ...


@dataclass(frozen=True)
class Queued(Event):
    """The request was admitted; `position` others are ahead of it."""

    position: int


@dataclass(frozen=True)
class Started(Event):
    """The work begins: the request waits no longer."""


@dataclass(frozen=True)
class EngineUse:
    """What ran a submodel: measured, not asked for. `seconds` is the time the pipeline waited for it, `reload_seconds`
    a part of it.
    """

    submodel: str
    target: str
    device: str
    calls: int
    seconds: float
    precision: str = ""
    fallbacks: tuple[str, ...] = ()
    reload_seconds: float = 0.0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done(Event):
    """The work is complete. Times are in seconds; `first_output_seconds` runs from the start to the first
    event that is an output.

    `notes` are those of the model: what differs from the published model or from the requested placement.
    """

    queue_seconds: float
    run_seconds: float
    first_output_seconds: float | None
    engines: tuple[EngineUse, ...]
    notes: tuple[str, ...] = ()


class Job:
    """A pipeline about to be driven. `stop` may be called from any thread."""

    def __init__(self, model: Model, pipeline: Pipeline, driver: Driver) -> None:
        self._model = model
        self._pipeline = pipeline
        self._driver = driver
        self._admitted = perf_counter()
        self._seconds: dict[str, list[float]] = {}
        self._reloads: dict[str, float] = {}
        self._stopped_by: EnginecastError | None = None

    def stop(self, error: EnginecastError) -> None:
        """Raise `error` from the pipeline before its next engine call. The first reason wins."""
        self._stopped_by = self._stopped_by or error

    def events(self) -> Iterator[Event]:
        """Do the work: `Started`, the pipeline's own events, `Done`. Raises what the pipeline, an engine or `stop`
        raises.
        """
        started = perf_counter()
        first_output: float | None = None
        yield Started()
        with closing(self._driver(self._stoppable(), self._model.engines)) as events:
            for event in events:
                if first_output is None and event.output:
                    first_output = perf_counter() - started
                yield event
        yield Done(
            started - self._admitted, perf_counter() - started, first_output, self._uses(), tuple(self._model.notes)
        )

    def _stoppable(self) -> Pipeline:
        """The pipeline, with a look at `stop` before every step. It is wrapped here, not in the driver, so that it
        holds for any driver.
        """
        outputs: Outputs | None = None
        with closing(self._pipeline) as pipeline:
            while True:
                if self._stopped_by is not None:
                    raise self._stopped_by
                try:
                    item = pipeline.send(outputs)
                except StopIteration:
                    return
                if isinstance(item, Call):
                    self._reloads.setdefault(item.submodel, self._model.engines[item.submodel].reload_seconds)
                began = perf_counter()
                outputs = yield item
                if isinstance(item, Call):
                    self._seconds.setdefault(item.submodel, []).append(perf_counter() - began)

    def _uses(self) -> tuple[EngineUse, ...]:
        return tuple(self._use(name, self._model.engines[name], seconds) for name, seconds in self._seconds.items())

    def _use(self, name: str, engine: Engine, seconds: Sequence[float]) -> EngineUse:
        again = engine.reload_seconds - self._reloads[name]
        told = precision(engine), engine.fallbacks, max(0.0, again), engine.chosen
        return EngineUse(name, engine.target, engine.device, len(seconds), sum(seconds), *told)


def precision(engine: Engine) -> str:
    """What a submodel computes in, for reading: "int8 W8A8, float32"."""
    return f"{engine.submodel.precision}, {engine.computes}"
