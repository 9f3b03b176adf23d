"""One request on one model: its pipeline with measured times, which can be stopped. Independent of threads, event loops
and protocols.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from runtime.engine import Engine
from runtime.errors import EnginecastError
from runtime.pipeline import Call, Event, Note, Outputs, Pipeline, Reused, drive
from runtime.placing.arriving import wanted


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
    @property
    def rest(self) -> Callable[[], Model] | None: ...
    def close(self) -> None: ...
    def broken(self) -> Sequence[str]: ...
    def elsewhere(self, broken: Sequence[str], /) -> Model: ...


@dataclass(frozen=True)
class Queued(Event):
    """The request was admitted; `position` others have to end before it starts. It is sent again when that changes.

    `eta_seconds` is the expected time until then, None if nothing is known of it. Whoever knows the `id` may collect or
    stop the request.
    """

    position: int
    eta_seconds: float | None = None
    id: str = ""


@dataclass(frozen=True)
class Started(Event):
    """The request has left the queue and runs."""


@dataclass(frozen=True)
class EngineUse:
    """The engine that really ran a submodel. `seconds` is the time that the pipeline waited for it, including
    `reload_seconds`, the time of loading it again. `reused` calls were not made: their outputs were held in memory.
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
    reused: int = 0


@dataclass(frozen=True)
class Done(Event):
    """The work is complete. Times are in seconds; `first_output_seconds` is the time from the start to the first output
    event.

    `notes` lists differences from the published model and from the requested placement, and what scripts noted.
    """

    queue_seconds: float
    run_seconds: float
    first_output_seconds: float | None
    engines: tuple[EngineUse, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        reused = sum(use.reused for use in self.engines)
        return {"reused_calls": reused} if reused else {}


class Job:
    """A pipeline on a model. `stop` may be called from any thread."""

    def __init__(self, model: Model, pipeline: Pipeline) -> None:
        self._model = model
        self._pipeline = pipeline
        self._admitted = perf_counter()
        self._seconds: dict[str, list[float]] = {}
        self._reloads: dict[str, float] = {}
        self._reused = Counter[str]()
        self.stopped_by: EnginecastError | None = None

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines that its calls run on."""
        return self._model.engines

    def stop(self, error: EnginecastError) -> None:
        """Make the pipeline raise `error` before its next engine call. Only the first call counts."""
        self.stopped_by = self.stopped_by or error

    def events(self) -> Generator[Event, None, None]:
        """Run it alone: the events of `items`."""
        return drive(self.items(), self.engines)

    def items(self) -> Pipeline:
        """The pipeline with `Started` before its calls and events, and `Done` behind them. Raises the errors of the
        pipeline and the one given to `stop`.
        """
        started, first_output, notes = perf_counter(), None, list[str]()
        yield Started()
        outputs: Outputs | None = None
        with closing(self._pipeline) as pipeline, suppress(StopIteration):
            while True:
                if self.stopped_by is not None:
                    raise self.stopped_by
                item = pipeline.send(outputs)
                outputs = None
                if isinstance(item, Call):
                    outputs = yield from self._timed(item)
                elif isinstance(item, Reused):
                    self._reused[item.submodel] += item.calls
                elif isinstance(item, Note):
                    notes.append(item.text)
                else:
                    if first_output is None and item.output:
                        first_output = perf_counter() - started
                    yield item
        yield Done(
            started - self._admitted, perf_counter() - started, first_output, self._uses(), (*self._model.notes, *notes)
        )

    def _timed(self, call: Call) -> Generator[Call, Outputs | None, Outputs | None]:
        if wanted(self.engines, call.submodel):  # else it has not been loaded again
            self._reloads.setdefault(call.submodel, self.engines[call.submodel].reload_seconds)
        began = perf_counter()
        outputs = yield call
        self._seconds.setdefault(call.submodel, []).append(perf_counter() - began)
        return outputs

    def _uses(self) -> tuple[EngineUse, ...]:
        names = dict.fromkeys((*self._seconds, *self._reused))
        return tuple(self._use(name, self.engines[name], self._seconds.get(name, ())) for name in names)

    def _use(self, name: str, engine: Engine, seconds: Sequence[float]) -> EngineUse:
        again = engine.reload_seconds - self._reloads.get(name, engine.reload_seconds)
        facts = precision(engine), engine.fallbacks, max(0.0, again), engine.chosen, self._reused[name]
        return EngineUse(name, engine.target, engine.device, len(seconds), sum(seconds), *facts)


def precision(engine: Engine) -> str:
    """The precision of a submodel's weights and computation as text, such as "int8 W8A8, float32"."""
    return f"{engine.submodel.precision}, {engine.computes}"
