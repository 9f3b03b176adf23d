"""The models of a server, without any protocol: what is loaded, who waits, what runs, how it all stops.

Every method runs on one event loop; engines run in worker threads. One pipeline at a time runs on a model (`slots`),
the rest wait in a bounded queue. A driver that batches takes the place of `drive` and raises `slots`.

A thread cannot be ended from outside. What computes or loads is told to stop, given a while, and then left behind: its
model is freed when the thread is done, and a process that stops does not wait for it (`ModelHost.close`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final

from runtime import limits as bounds
from runtime.bundle.manifest import Bundle
from runtime.engine import targets
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
    quoted,
)
from runtime.pipeline import Event, drive
from runtime.task import Request
from serving.dialects.grpc.shown import concealed, without_paths
from serving.host.job import Done, Driver, Job, Model, Queued, precision
from serving.host.mailbox import Mailbox
from serving.host.turns import Turns

log = logging.getLogger(__name__)

Loader = Callable[[Bundle | Path, str | None], Model]
"""Loads a bundle for a target, or for the best usable one: the one that was opened, or the one at a folder where that
failed.
"""
STUCK_SECONDS: Final = 30.0
"""How long an engine may take to end a step when a model is unloaded, before it is left behind."""
IDLE_SECONDS: Final = 0.7
"""The same when the server stops."""
KEPT: Final = 4
"""One in so many places of a queue is kept for clients that have no request there."""


class ModelState(Enum):
    """Whether a model can be used."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True)
class Limits:
    """How much a host takes on. `slots` pipelines run at once on a model, `max_queue` wait; `grace_seconds` is how long
    they may finish.
    """

    slots: int = 1
    max_queue: int = 16
    grace_seconds: float = 30.0


@dataclass(frozen=True)
class Offer:
    """A bundle and the name it is served by. `error` says why it could not be opened: loading may succeed once it is
    repaired.

    What could be opened is what is served: another bundle that lies in its folder later is refused.
    """

    name: str
    root: Path
    bundle: Bundle | None = None
    error: EnginecastError | None = None

    @property
    def quant(self) -> str:
        return self.bundle.manifest.quant if self.bundle else ""

    @classmethod
    def of(cls, root: Path, name: str = "") -> Offer:
        """The bundle at `root`, under a name of its own or that of its manifest, or of its folder where it cannot be
        opened.
        """
        try:
            bundle = Bundle(root)
        except EnginecastError as error:
            return cls(name or root.absolute().name, root, error=error)
        return cls(name or bundle.name, root, bundle)


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

    `task` is known once it was loaded; `target`, `device`, `placements` and `notes` while it is; `error` when loading
    failed.
    """

    name: str
    state: ModelState
    quant: str
    task: str | None
    target: str | None
    device: str | None
    error: str | None
    running: int
    queued: int
    placements: tuple[Placement, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Place:
    """A place that a request takes, running or waiting: of which client, and how many bytes it holds meanwhile."""

    client: str
    nbytes: int


class _Run:
    """A job on its way through a worker thread, seen from the event loop."""

    def __init__(self, job: Job, place: Place, workers: ThreadPoolExecutor) -> None:
        self.job = job
        self.place = place
        self.events = Mailbox()
        self.error: BaseException | None = None
        self.future: Future[None] = workers.submit(self._work)

    def _work(self) -> None:
        try:
            for event in self.job.events():
                self.events.put(event)
        except BaseException as error:  # it is raised again on the event loop, by whoever reads the events
            self.error = error
            self.events.end(error)
        else:
            self.events.end()

    def fail(self, error: EnginecastError) -> None:
        """End at once for the reader, and within one step on the engine."""
        self.job.stop(error)
        self.future.cancel()
        self.events.end(error, at_once=True)


class _Grace:
    """How long what runs may take to finish. The server's own period, once it is running, bounds every other."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    def begin(self, seconds: float) -> None:
        """The server stops: all periods end within this time."""
        asyncio.get_running_loop().call_later(seconds, self._over.set)

    async def wait(self, futures: Collection[Future[None]], seconds: float) -> bool:
        """Whether all are done within `seconds`, or less where the server stops."""
        if not futures:
            return True
        over = asyncio.create_task(self._over.wait())
        done = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        try:
            await asyncio.wait((over, done), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return done.done()
        finally:
            over.cancel()


class _Served:
    """One model of the host: its bundle, its state, and what runs on it."""

    def __init__(self, offer: Offer, allowed: Limits) -> None:
        self.offer = offer
        self.limits = allowed
        self.state = ModelState.UNLOADED
        self.model: Model | None = None
        self.task: str | None = None
        self.error: str | None = None
        self.places: set[Place] = set()
        self.runs: set[_Run] = set()
        self.change: asyncio.Task[None] | None = None
        self.check: asyncio.Task[None] | None = None
        self.workers = self._new_workers()
        if offer.error is not None:
            self.state, self.error = ModelState.FAILED, str(self.concealed(offer.error))

    def _new_workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.limits.slots, thread_name_prefix=self.name)

    @property
    def name(self) -> str:
        return self.offer.name

    def concealed(self, error: EnginecastError) -> EnginecastError:
        """The error as clients get it. The log has it whole."""
        return concealed(error, self.offer.root, self.name)

    def shown(self, event: Event) -> Event:
        """The event as clients get it."""
        return replace(event, notes=self._notes(event.notes)) if isinstance(event, Done) else event

    def _notes(self, notes: Iterable[str]) -> tuple[str, ...]:
        return tuple(without_paths(note, self.offer.root, self.name) for note in notes)

    def ready(self, task: str) -> Model:
        """The loaded model, if it does this task."""
        if self.state is not ModelState.READY or self.model is None:
            why = f": {self.error}" if self.error else ""
            raise Unavailable(f"model {self.name} is {self.state.value}{why}. Try again when it is ready, or load it")
        if self.model.task != task:
            raise InvalidInput(
                "model", f"{self.name} has the task {self.model.task}, expected a model with the task {task}"
            )
        return self.model

    def enter(self, client: str, nbytes: int) -> Place:
        """A place for a request. Raises ResourceExhausted."""
        free, kept = self.limits.slots + self.limits.max_queue - len(self.places), self.limits.max_queue // KEPT
        if free <= 0:
            raise ResourceExhausted(
                f"the queue of model {self.name} is full ({self.limits.max_queue} requests wait): try again later"
            )
        if free <= kept and any(place.client == client for place in self.places):
            raise ResourceExhausted(
                f"the last {kept} places in the queue of model {self.name} are kept for other clients: try again later"
            )
        place = Place(client, nbytes)
        self.places.add(place)
        return place

    def start(self, job: Job, place: Place, ended: Callable[[_Run], None]) -> _Run:
        """Have a worker do the job; `ended` is called on the loop when it has."""
        loop = asyncio.get_running_loop()
        run = _Run(job, place, self.workers)
        self.runs.add(run)

        def done(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop was closed: the server has stopped and left this behind
                loop.call_soon_threadsafe(ended, run)

        run.future.add_done_callback(done)
        return run

    def leave_behind(self) -> ThreadPoolExecutor:
        """Give up the worker threads, which are busy, for new ones. The old ones end when they have done what they were
        given.
        """
        workers, self.workers = self.workers, self._new_workers()
        for run in self.runs:
            self.places.discard(run.place)
        self.runs.clear()
        return workers

    def status(self) -> Status:
        running = min(len(self.runs), self.limits.slots)
        target, device = (self.model.target, self.model.device) if self.model else (None, None)
        placements = tuple(
            Placement(name, engine.target, engine.device, precision(engine), engine.fallbacks, engine.chosen)
            for name, engine in (self.model.engines if self.model else {}).items()
        )
        notes = self._notes(self.model.notes) if self.model else ()
        queued, quant = len(self.places) - running, self.offer.quant
        return Status(
            self.name, self.state, quant, self.task, target, device, self.error, running, queued, placements, notes
        )


class ModelHost:
    """Holds models by name and runs requests on them. The models are those of `bundles`, none loaded yet.

    `changed` is set, and replaced by a new event, whenever the state of a model changes. Raises InvalidInput when two
    bundles have the same name, or one that cannot be served.
    """

    def __init__(
        self, bundles: Iterable[Bundle | Offer], loader: Loader, limits: Limits | None = None, driver: Driver = drive
    ) -> None:
        self.limits = limits or Limits()
        self.changed = asyncio.Event()
        self.stopping = False
        self._grace = _Grace()
        self._turns = Turns(bounds.CHECKED.most)
        self._checks = ThreadPoolExecutor(bounds.CHECKS.most, thread_name_prefix="checks")
        self._loader = loader
        self._driver = driver
        self._models: dict[str, _Served] = {}
        for bundle in bundles:
            offer = bundle if isinstance(bundle, Offer) else Offer(bundle.name, bundle.root, bundle)
            check_name(offer.name)
            if offer.name in self._models:
                other = self._models[offer.name].offer.root
                raise InvalidInput(
                    "bundle",
                    f"{offer.root} and {other} are both called '{offer.name}': give one another name, as in "
                    f"`enginecast serve {offer.name}={other} {offer.name}-2={offer.root}`",
                )
            self._models[offer.name] = _Served(offer, self.limits)

    def status(self, name: str) -> Status:
        """The model as it stands. Raises NotFound with the nearest name."""
        return self._find(name).status()

    def statuses(self) -> list[Status]:
        """Every model as it stands, by name."""
        return [self._models[name].status() for name in sorted(self._models)]

    def ready(self) -> dict[str, str | None]:
        """The task of each model, None where it cannot be used now."""
        usable = {name: served.state is ModelState.READY and not self.stopping for name, served in self._models.items()}
        return {name: self._models[name].task if can else None for name, can in usable.items()}

    async def run(
        self, name: str, request: Request, timeout: float | None = None, client: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Run a request: `Queued`, `Started`, the pipeline's events, `Done`. Closing the generator frees the engine
        within one step.

        `client` is who sent it. Raises NotFound, Unavailable,
        InvalidInput, ResourceExhausted, DeadlineExceeded after `timeout` seconds, or what the engine raises.
        """
        served = self._find(name)
        self._open()
        served.ready(request.task)
        place = self._enter(served, client, request.nbytes)
        job = await self._job(served, request, place)
        position = len(served.runs)
        run = served.start(job, place, partial(self._ended, served))
        over = DeadlineExceeded(
            f"the request was not done after {timeout or 0:.3g} s: allow it more time or ask for less work"
        )
        timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, run.fail, over)
        try:
            yield Queued(position)
            while (event := await run.events.get()) is not None:
                yield served.shown(event)
        except EnginecastError as error:
            if isinstance(error, InvalidInput):  # it quotes the request
                raise
            log.info("model %s: %s", served.name, error)
            raise served.concealed(error) from error
        finally:
            if timer is not None:
                timer.cancel()
            run.fail(Cancelled("the caller left"))

    def _enter(self, served: _Served, client: str, nbytes: int) -> Place:
        held = sum(place.nbytes for other in self._models.values() for place in other.places)
        if nbytes and held + nbytes > bounds.WAITING_BYTES.most:
            raise ResourceExhausted(
                "the pictures of requests that wait take all the memory there is for them: try again later"
            )
        return served.enter(client, nbytes)

    async def _job(self, served: _Served, request: Request, place: Place) -> Job:
        """The work that a request is. It is checked (tokenized) off the loop.

        The place is given up when that is over and failed, not when the caller leaves: a client leaves no work behind
        that does not count.
        """

        async def check() -> Any:
            async with self._turns(place.client):
                return await asyncio.get_running_loop().run_in_executor(
                    self._checks, served.ready(request.task).pipeline, request
                )

        checked = asyncio.create_task(check())
        try:
            pipeline = await asyncio.shield(checked)
            return Job(served.ready(request.task), pipeline, self._driver)
        except BaseException:

            def leave(task: asyncio.Future[Any]) -> None:
                served.places.discard(place)
                if not task.cancelled():
                    task.exception()  # it was raised already, or nobody is there any more

            checked.add_done_callback(leave)
            raise

    async def load(self, name: str, target: str | None = None) -> None:
        """Load a model; loading goes on when the caller leaves. Raises NotFound, Unavailable, InvalidInput, or why it
        cannot be loaded.

        A model that cannot be loaded on a target that the caller chose stays as it was.
        """
        served = self._find(name)
        self._open()
        if target is not None:
            bounds.NAME.length("target", target)
            if target not in targets():
                raise InvalidInput("target", f"{quoted(target)} is not known: {did_you_mean(target, targets())}")
        if served.state is ModelState.READY and served.model is not None:
            if target not in (None, served.model.target):
                raise InvalidInput(
                    "target", f"{name} is loaded on {served.model.target}: unload it before loading it on {target}"
                )
            return
        self._settled(served)
        await self._change(served, self._load(served, target))

    async def unload(self, name: str, grace: float | None = None) -> None:
        """Finish, or after `grace` seconds stop, what runs on a model, then free its engines. Raises NotFound,
        Unavailable.
        """
        served = self._find(name)
        self._settled(served)
        if served.state is ModelState.READY:
            await self._change(served, self._unload(served, self.limits.grace_seconds if grace is None else grace))

    async def close(self, grace: float | None = None) -> bool:
        """Refuse new requests, finish or after `grace` seconds stop those that run, free all engines.

        Returns IDLE_SECONDS after that at the latest: False where something still loads or computes, which is left
        behind.
        """
        grace = self.limits.grace_seconds if grace is None else grace
        self.stopping = True
        self._grace.begin(grace)
        self._notify()
        shut = asyncio.gather(*(self._shut(served, grace) for served in self._models.values()))
        try:
            free = all(await asyncio.wait_for(shut, grace + IDLE_SECONDS))
        except TimeoutError:
            free = False
        for served in self._models.values():
            served.workers.shutdown(wait=False)
        self._checks.shutdown(wait=False)
        return free

    async def _shut(self, served: _Served, grace: float) -> bool:
        """Unload a model; whether it was. Loading is not waited for: nobody is going to use what is loaded."""
        changes = {task for task in (served.change, served.check) if task is not None}
        if changes:
            await asyncio.wait(changes, timeout=IDLE_SECONDS if served.state is ModelState.LOADING else None)
        if served.change is not None:
            log.warning("model %s is still %s: it is left behind", served.name, served.state.value)
            return False
        with suppress(Exception):  # it was logged
            await self.unload(served.name, grace)
        return served.model is None and not served.runs

    def _find(self, name: str) -> _Served:
        if not name:
            raise InvalidInput("model", f"is missing: name one of {', '.join(sorted(self._models))}")
        if name not in self._models:
            raise NotFound(f"model {quoted(name)} is not served here: {did_you_mean(name, self._models)}")
        return self._models[name]

    def _open(self) -> None:
        if self.stopping:
            raise Unavailable("the server is stopping: try again when it runs again")

    def _settled(self, served: _Served) -> None:
        if served.change is not None:
            raise Unavailable(f"model {served.name} is {served.state.value}: try again when it is done")

    async def _change(self, served: _Served, work: Coroutine[Any, Any, None]) -> None:
        """Run a change of state to its end, even when the caller leaves: half a load would leave engines that nobody
        owns.
        """

        def ended(task: asyncio.Task[None]) -> None:
            served.change = None
            if not task.cancelled() and (error := task.exception()):
                expected = isinstance(error, EnginecastError)
                log.log(
                    logging.INFO if expected else logging.ERROR,
                    "model %s: %s",
                    served.name,
                    error,
                    exc_info=None if expected else error,
                )

        served.change = asyncio.create_task(work)
        served.change.add_done_callback(ended)
        try:
            await asyncio.shield(served.change)
        except InvalidInput:
            raise
        except EnginecastError as error:
            raise served.concealed(error) from error

    def _ended(self, served: _Served, run: _Run) -> None:
        """Where an engine failed, see whether it was the request or the engine: a device may have been taken away."""
        served.runs.discard(run)
        served.places.discard(run.place)
        if (
            isinstance(run.error, EngineError)
            and served.state is ModelState.READY
            and served.check is None
            and not self.stopping
        ):
            served.check = asyncio.create_task(self._check(served, run.error))

    async def _check(self, served: _Served, error: EngineError) -> None:
        """Load a model again, elsewhere where it can be, if its engines do not even run a sample. Until then requests
        wait behind this.
        """
        try:
            model = served.model
            broken = await asyncio.wrap_future(served.workers.submit(model.broken)) if model else ()
            if broken and served.state is ModelState.READY and served.model is model and served.change is None:
                log.error("model %s: %s cannot run any more: %s", served.name, " and ".join(broken), error)
                with suppress(Exception):  # it is in the model's status and in the log
                    await self._change(served, self._reload(served, broken, error))
        finally:
            served.check = None

    async def _reload(self, served: _Served, broken: Sequence[str], error: EngineError) -> None:
        self._become(served, ModelState.LOADING)
        why = f"{' and '.join(broken)} of model {served.name} stopped working ({error})"
        await self._drain(
            served, 0, Unavailable(f"{why}: the model is being loaded again, send the request again when it is ready")
        )
        model, served.model = served.model, None
        assert model is not None, "a model is ready when it is found broken"
        try:
            served.model = await asyncio.wrap_future(served.workers.submit(model.elsewhere, broken))
        except Exception as reason:
            self._become(served, ModelState.FAILED, f"{why}, and it could not be loaded again: {reason}")
            raise
        self._become(served, ModelState.READY)

    def _become(self, served: _Served, state: ModelState, error: str | None = None) -> None:
        served.state = state
        served.error = None if error is None else without_paths(error, served.offer.root, served.name)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _load(self, served: _Served, target: str | None) -> None:
        before = served.state, served.error
        self._become(served, ModelState.LOADING)
        try:
            served.model = await asyncio.wrap_future(
                served.workers.submit(self._loader, served.offer.bundle or served.offer.root, target)
            )
        except Exception as error:
            if target is None:
                self._become(served, ModelState.FAILED, str(error) or type(error).__name__)
            else:
                self._become(served, *before)
            raise
        served.task = served.model.task
        self._become(served, ModelState.READY)

    async def _unload(self, served: _Served, grace: float) -> None:
        self._become(served, ModelState.UNLOADING)
        why = "the server is stopping" if self.stopping else f"model {served.name} is being unloaded"
        idle = await self._drain(
            served, grace, Unavailable(f"{why} and the request did not finish within {grace:g} s: send it again later")
        )
        if served.check is not None:
            _, checking = await asyncio.wait([served.check], timeout=self._patience())
            idle = idle and not checking
        model, served.model = served.model, None
        try:
            if model is not None:
                workers = served.workers if idle else served.leave_behind()
                closing = workers.submit(model.close)
                if idle:
                    await asyncio.wrap_future(closing)
                else:
                    workers.shutdown(wait=False)
        finally:
            self._become(served, ModelState.UNLOADED)

    async def _drain(self, served: _Served, grace: float, error: EnginecastError) -> bool:
        """Wait `grace` seconds for what runs and waits, then stop the rest with `error`. Returns whether the engines
        are idle.
        """
        if await self._grace.wait([run.future for run in served.runs], grace):
            return True
        for run in served.runs:
            run.fail(error)
        pending = {asyncio.wrap_future(run.future) for run in served.runs if not run.future.done()}
        if not pending:
            return True
        _, pending = await asyncio.wait(pending, timeout=self._patience())
        if pending:
            log.error("model %s: a request has not ended the step it is in: it is left behind", served.name)
        return not pending

    def _patience(self) -> float:
        return IDLE_SECONDS if self.stopping else STUCK_SECONDS


def check_name(name: str) -> None:
    """Raise InvalidInput unless a model can be served by this name."""
    bounds.MODEL_NAME.length("name", name)
    if not name or not name.isprintable() or name != name.strip():
        raise InvalidInput(
            "name", f"{quoted(name)} is no name of a model: give it one of printable characters, as in NAME=DIR"
        )
