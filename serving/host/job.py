"""One request on one model: runs its pipeline, measures the time and can be stopped. Independent of threads, event
loops and protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from runtime.engine import Engine
from runtime.errors import EnginecastError
from runtime.pipeline import Call, Engines, Event, Outputs, Pipeline

Driver = Callable[[Pipeline, Engines], Generator[Event, None, None]]
"""Runs a pipeline's calls and yields its events: `runtime.pipeline.drive`, or a function that batches the calls of
several jobs.
"""


class Model(Protocol):
    """The parts of a loaded model that a job uses (`runtime.placing.loading.LoadedModel`)."""

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
    """The request has left the queue and runs."""


@dataclass(frozen=True)
class EngineUse:
    """The engine that really ran a submodel. `seconds` is the time that the pipeline waited for it, including
    `reload_seconds`, the time of loading it again.
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
    """The work is complete. Times are in seconds; `first_output_seconds` is the time from the start to the first output
    event.

    `notes` lists differences from the published model and from the requested placement.
    """

    queue_seconds: float
    run_seconds: float
    first_output_seconds: float | None
    engines: tuple[EngineUse, ...]
    notes: tuple[str, ...] = ()


class Job:
    """A pipeline and the means to run it. `stop` may be called from any thread."""

    def __init__(self, model: Model, pipeline: Pipeline, driver: Driver) -> None:
        self._model = model
        self._pipeline = pipeline
        self._driver = driver
        self._admitted = perf_counter()
        self._seconds: dict[str, list[float]] = {}
        self._reloads: dict[str, float] = {}
        self._stopped_by: EnginecastError | None = None

    def stop(self, error: EnginecastError) -> None:
        """Make the pipeline raise `error` before its next engine call. Only the first call counts."""
        self._stopped_by = self._stopped_by or error

    def events(self) -> Generator[Event, None, None]:
        """Run the pipeline: yields `Started`, its events and `Done`. Raises the errors of the pipeline and its engines,
        and the error given to `stop`.
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
        """The pipeline with a check of `stop` before every step. It is here, not in the driver, so that any driver has
        it.
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
        facts = precision(engine), engine.fallbacks, max(0.0, again), engine.chosen
        return EngineUse(name, engine.target, engine.device, len(seconds), sum(seconds), *facts)


def precision(engine: Engine) -> str:
    """The precision of a submodel's weights and computation as text, such as "int8 W8A8, float32"."""
    return f"{engine.submodel.precision}, {engine.computes}"
