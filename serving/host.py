"""The models of a server, without any protocol: what is loaded, who waits, what runs, how it all stops.

Every method runs on one event loop; engines run in worker threads. One pipeline at a time runs on a model (`slots`), the rest wait in a
bounded queue. A driver that batches takes the place of `drive` and raises `slots`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    EnginecastError,
    EngineError,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
    did_you_mean,
)
from runtime.pipeline import Event, drive
from serving.job import Driver, Job, Kind, Model, Queued, precision

log = logging.getLogger(__name__)

Loader = Callable[[Path, str | None], Model]
"""Loads the bundle at a folder for a target, or for the best usable one."""


class State(Enum):
    """Whether a model can be used."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True)
class Limits:
    """How much a host takes on. `slots` pipelines run at once on a model, `max_queue` wait; `grace_seconds` is how long they may finish."""

    slots: int = 1
    max_queue: int = 16
    grace_seconds: float = 30.0


@dataclass(frozen=True)
class Placement:
    """What a submodel runs on, as it is and not as asked for."""

    submodel: str
    target: str
    device: str
    precision: str
    fallbacks: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """A model as it stands.

    `kind` is known once it was loaded; `target`, `device`, `placements` and `notes` while it is; `error` when loading failed.
    """

    name: str
    state: State
    quant: str
    kind: Kind | None
    target: str | None
    device: str | None
    error: str | None
    running: int
    queued: int
    placements: tuple[Placement, ...] = ()
    notes: tuple[str, ...] = ()


class _Run:
    """A job on its way through a worker thread, seen from the event loop."""

    def __init__(self, job: Job, workers: ThreadPoolExecutor) -> None:
        self.job = job
        self.events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self.future: Future[None] = workers.submit(self._work)

    def _work(self) -> None:
        def send(item: Event | BaseException | None) -> None:
            self._loop.call_soon_threadsafe(self.events.put_nowait, item)

        try:
            for event in self.job.events():
                send(event)
        except BaseException as error:  # it is raised again on the event loop, by whoever reads the events
            self.error = error
            send(error)
        else:
            send(None)

    def fail(self, error: EnginecastError) -> None:
        """End at once for the reader, and within one step on the engine."""
        self.job.stop(error)
        self.future.cancel()
        self.events.put_nowait(error)


class _Served:
    """One model of the host: its bundle, its state, and what runs on it."""

    def __init__(self, bundle: Bundle, limits: Limits) -> None:
        self.bundle = bundle
        self.limits = limits
        self.state = State.UNLOADED
        self.model: Model | None = None
        self.kind: Kind | None = None
        self.error: str | None = None
        self.runs: set[_Run] = set()
        self.change: asyncio.Task[None] | None = None
        self.check: asyncio.Task[None] | None = None
        self.workers = ThreadPoolExecutor(limits.slots, thread_name_prefix=bundle.name)

    @property
    def name(self) -> str:
        return self.bundle.name

    def ready(self, kind: Kind) -> Model:
        """The loaded model, if it does this kind of work and has a place free."""
        if self.state is not State.READY or self.model is None:
            why = f": {self.error}" if self.error else ""
            raise Unavailable(f"model {self.name} is {self.state.value}{why}. Try again when it is ready, or load it")
        if self.model.kind != kind:
            raise InvalidInput("model", f"{self.name} is a {self.model.kind} model, expected a {kind} model")
        if len(self.runs) >= self.limits.slots + self.limits.max_queue:
            raise ResourceExhausted(f"the queue of model {self.name} is full ({self.limits.max_queue} requests wait): try again later")
        return self.model

    def start(self, job: Job, ended: Callable[[_Run], None]) -> _Run:
        """Have a worker do the job; `ended` is called on the loop when it has."""
        loop = asyncio.get_running_loop()
        run = _Run(job, self.workers)
        self.runs.add(run)
        run.future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended, run))
        return run

    async def drain(self, grace: float, error: EnginecastError) -> None:
        """Wait `grace` seconds for what runs and waits, then stop the rest with `error`, and wait until the engines are idle."""
        pending = {asyncio.wrap_future(run.future) for run in self.runs}
        if pending:
            _, pending = await asyncio.wait(pending, timeout=grace)
        if pending:
            for run in self.runs:
                run.fail(error)
            await asyncio.wait(pending)

    def status(self) -> Status:
        running = min(len(self.runs), self.limits.slots)
        target, device = (self.model.target, self.model.device) if self.model else (None, None)
        placements = tuple(
            Placement(name, engine.target, engine.device, precision(engine), engine.fallbacks, engine.chosen)
            for name, engine in (self.model.engines if self.model else {}).items()
        )
        notes = tuple(self.model.notes) if self.model else ()
        queued, quant = len(self.runs) - running, self.bundle.manifest.quant
        return Status(self.name, self.state, quant, self.kind, target, device, self.error, running, queued, placements, notes)


class ModelHost:
    """Holds models by name and runs requests on them. The models are those of `bundles`, none loaded yet.

    `changed` is set whenever the state of a model changes. Raises InvalidInput when two bundles have the same name.
    """

    def __init__(self, bundles: Iterable[Bundle], loader: Loader, limits: Limits | None = None, driver: Driver = drive) -> None:
        self.limits = limits or Limits()
        self.changed = asyncio.Event()
        self.stopping = False
        self._loader = loader
        self._driver = driver
        self._models: dict[str, _Served] = {}
        for bundle in bundles:
            if bundle.name in self._models:
                other = self._models[bundle.name].bundle.root
                raise InvalidInput("bundle", f"{bundle.root} and {other} are both called '{bundle.name}': serve one of them")
            self._models[bundle.name] = _Served(bundle, self.limits)

    def status(self, name: str) -> Status:
        """The model as it stands. Raises NotFound with the nearest name."""
        return self._find(name).status()

    def statuses(self) -> list[Status]:
        """Every model as it stands, by name."""
        return [self._models[name].status() for name in sorted(self._models)]

    async def run(self, name: str, kind: Kind, request: Any, timeout: float | None = None) -> AsyncGenerator[Event, None]:
        """Run a request: `Queued`, `Started`, the pipeline's events, `Done`. Closing the generator frees the engine within one step.

        Raises NotFound, Unavailable, InvalidInput, ResourceExhausted, DeadlineExceeded after `timeout` seconds, or what the engine raises.
        """
        served = self._find(name)
        self._open()
        # The request is checked (tokenized, its pictures decoded) off the loop, and before it takes a place in the queue.
        pipeline = await asyncio.to_thread(served.ready(kind).pipeline, request)
        job = Job(served.ready(kind), pipeline, self._driver)
        position = len(served.runs)
        run = served.start(job, partial(self._ended, served))
        over = DeadlineExceeded(f"the request was not done after {timeout or 0:.3g} s: allow it more time or ask for less work")
        timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, run.fail, over)
        try:
            yield Queued(position)
            while (item := await run.events.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if timer is not None:
                timer.cancel()
            run.fail(Cancelled("the caller left"))

    async def load(self, name: str, target: str | None = None) -> None:
        """Load a model; loading goes on when the caller leaves. Raises NotFound, Unavailable, InvalidInput, or why it cannot be loaded."""
        served = self._find(name)
        self._open()
        if served.state is State.READY and served.model is not None:
            if target not in (None, served.model.target):
                raise InvalidInput("target", f"{name} is loaded on {served.model.target}: unload it before loading it on {target}")
            return
        self._settled(served)
        await self._change(served, self._load(served, target))

    async def unload(self, name: str, grace: float | None = None) -> None:
        """Finish, or after `grace` seconds stop, what runs on a model, then free its engines. Raises NotFound, Unavailable."""
        served = self._find(name)
        self._settled(served)
        if served.state is State.READY:
            await self._change(served, self._unload(served, self.limits.grace_seconds if grace is None else grace))

    async def close(self, grace: float | None = None) -> None:
        """Refuse new requests, unload every model, end the worker threads."""
        self.stopping = True
        self.changed.set()
        tasks = [task for served in self._models.values() for task in (served.check, served.change) if task]
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self.unload(name, grace) for name in self._models))
        for served in self._models.values():
            served.workers.shutdown()

    def _find(self, name: str) -> _Served:
        if not name:
            raise InvalidInput("model", f"is missing: name one of {', '.join(sorted(self._models))}")
        if name not in self._models:
            raise NotFound(f"model '{name}' is not served here: {did_you_mean(name, self._models)}")
        return self._models[name]

    def _open(self) -> None:
        if self.stopping:
            raise Unavailable("the server is stopping: try again when it runs again")

    def _settled(self, served: _Served) -> None:
        if served.change is not None:
            raise Unavailable(f"model {served.name} is {served.state.value}: try again when it is done")

    async def _change(self, served: _Served, work: Coroutine[Any, Any, None]) -> None:
        """Run a change of state to its end, even when the caller leaves: half a load would leave engines that nobody owns."""

        def ended(task: asyncio.Task[None]) -> None:
            served.change = None
            if not task.cancelled() and (error := task.exception()):
                expected = isinstance(error, EnginecastError)
                log.log(
                    logging.INFO if expected else logging.ERROR, "model %s: %s", served.name, error, exc_info=None if expected else error
                )

        served.change = asyncio.create_task(work)
        served.change.add_done_callback(ended)
        await asyncio.shield(served.change)

    def _ended(self, served: _Served, run: _Run) -> None:
        """Where an engine failed, see whether it was the request or the engine: a device may have been taken away."""
        served.runs.discard(run)
        if isinstance(run.error, EngineError) and served.state is State.READY and served.check is None and not self.stopping:
            served.check = asyncio.create_task(self._check(served, run.error))

    async def _check(self, served: _Served, error: EngineError) -> None:
        """Load a model again, elsewhere where it can be, if its engines do not even run a sample. Until then requests wait behind this."""
        try:
            model = served.model
            broken = await asyncio.wrap_future(served.workers.submit(model.broken)) if model else ()
            if broken and served.state is State.READY and served.model is model and served.change is None:
                log.error("model %s: %s cannot run any more: %s", served.name, " and ".join(broken), error)
                with suppress(Exception):  # it is in the model's status and in the log
                    await self._change(served, self._reload(served, broken, error))
        finally:
            served.check = None

    async def _reload(self, served: _Served, broken: Sequence[str], error: EngineError) -> None:
        self._become(served, State.LOADING)
        why = f"{' and '.join(broken)} of model {served.name} stopped working ({error})"
        await served.drain(0, Unavailable(f"{why}: the model is being loaded again, send the request again when it is ready"))
        model, served.model = served.model, None
        assert model is not None, "a model is ready when it is found broken"
        try:
            served.model = await asyncio.to_thread(model.elsewhere, broken)
        except Exception as reason:
            self._become(served, State.FAILED, f"{why}, and it could not be loaded again: {reason}")
            raise
        self._become(served, State.READY)

    def _become(self, served: _Served, state: State, error: str | None = None) -> None:
        served.state, served.error = state, error
        self.changed.set()

    async def _load(self, served: _Served, target: str | None) -> None:
        self._become(served, State.LOADING)
        try:
            served.model = await asyncio.to_thread(self._loader, served.bundle.root, target)
        except Exception as error:
            self._become(served, State.FAILED, str(error) or type(error).__name__)
            raise
        served.kind = served.model.kind
        self._become(served, State.READY)

    async def _unload(self, served: _Served, grace: float) -> None:
        self._become(served, State.UNLOADING)
        why = "the server is stopping" if self.stopping else f"model {served.name} is being unloaded"
        await served.drain(grace, Unavailable(f"{why} and the request did not finish within {grace:g} s: send it again later"))
        if served.check is not None:
            await asyncio.wait([served.check])
        model, served.model = served.model, None
        try:
            if model is not None:
                await asyncio.to_thread(model.close)
        finally:
            self._become(served, State.UNLOADED)
