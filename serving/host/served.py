"""One model of a server: its bundle, its state, its scheduler and its requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Final

from runtime.errors import SOON, EnginecastError, InvalidInput, ResourceExhausted, Unavailable
from runtime.pipeline import Event
from runtime.placing.arriving import Arriving, coming, here
from serving.host.batches import Ran
from serving.host.inference import ANY
from serving.host.job import Done, Job, Model, Queued, precision
from serving.host.observing import Observer
from serving.host.offers import Limits, Offer
from serving.host.run import Reservation, Run
from serving.host.scheduler import Scheduler
from serving.host.shown import concealed, without_paths
from serving.host.states import ModelState, Status, SubmodelStatus
from serving.host.terms import Terms

RETRY_SECONDS: Final = 30.0
"""A model that could not be loaded is loaded for a request again after this time."""
PACE: Final = 8
"""So many of the last requests tell how long one takes."""
KEPT: Final = 4
"""This fraction of a queue, one place in 4, is reserved for clients that have no request in it."""


class Served:
    """One model: its bundle, its state and its requests. Used on the event loop only."""

    def __init__(self, offer: Offer, allowed: Limits, observer: Observer | None = None) -> None:
        self.offer = offer
        self.limits = allowed
        self.state = ModelState.UNLOADED
        self.model: Model | None = None
        self.error: str | None = None
        self.failed_at = -RETRY_SECONDS
        self.target: str | None = None
        self.withheld = False
        self.hidden = False
        self.memory: Mapping[str, int] = {}
        self.begun = asyncio.Event()
        """Is set while the model is loaded and takes requests already."""
        self.asked: tuple[()] | tuple[float | None] = ()
        """The keep-alive of the last request that ended meanwhile."""
        self.last_used: float | None = None
        self.expires: float | None = None
        self.places: set[Reservation] = set()
        self.vacated = asyncio.Event()
        self.runs: dict[Run, str] = {}
        self.started = 0
        self._pace = deque[float](maxlen=PACE)
        self.change: asyncio.Task[None] | None = None
        self.replacing: asyncio.Task[None] | None = None
        self.check: asyncio.Task[None] | None = None
        self._observer = observer or Observer()
        self.scheduler = self._new_scheduler()
        self.take(offer)

    def take(self, offer: Offer) -> None:
        """Serve this offer from now on. Only while the model is not loaded."""
        self.offer = offer
        self.state, self.error = ModelState.UNLOADED, None
        if offer.error is not None:
            self.state, self.error = ModelState.FAILED, str(self.concealed(offer.error))

    def _new_scheduler(self) -> Scheduler:
        def ran(ran: Ran) -> None:
            self._observer.ran(self.name, ran.submodel, len(ran.runs), ran.seconds)

        return Scheduler(self.name, self.limits.slots, ran)

    @property
    def name(self) -> str:
        return self.offer.name

    @property
    def task(self) -> str | None:
        """The task of the model, None if its bundle could not be opened."""
        return self.model.task if self.model else self.offer.task

    @property
    def idle(self) -> bool:
        """Whether the model is loaded and nothing uses or changes it."""
        return self.state is ModelState.READY and not self.places and not self.changes

    @property
    def changes(self) -> set[asyncio.Task[None]]:
        """What changes the model now."""
        return {task for task in (self.change, self.replacing, self.check) if task is not None}

    async def unchanging(self) -> None:
        """Wait until nothing changes the model."""
        while self.changes:
            await asyncio.wait(self.changes)

    @property
    def on_demand(self) -> bool:
        """Whether the next request loads the model: nobody unloaded it, and it has not failed a moment ago."""
        rested = self.state is ModelState.FAILED and monotonic() - self.failed_at >= RETRY_SECONDS
        return (rested or self.state is ModelState.UNLOADED) and not self.withheld

    def concealed(self, error: EnginecastError) -> EnginecastError:
        """The error as clients see it, without paths."""
        return concealed(error, self.offer.root, self.name)

    def shown(self, event: Event) -> Event:
        """The event as clients see it, without paths."""
        return replace(event, notes=self._notes(event.notes)) if isinstance(event, Done) else event

    def _notes(self, notes: Iterable[str]) -> tuple[str, ...]:
        return tuple(without_paths(note, self.offer.root, self.name) for note in notes)

    def expect(self, task: str) -> None:
        """Raise InvalidInput if the model is known to have another task. `ANY` is the task of every model."""
        if task != ANY and self.task not in (None, task):
            raise InvalidInput("model", f"{self.name} has the task {self.task}, expected a model with the task {task}")

    def ready(self, task: str) -> Model:
        """The model that runs requests of this task: a loaded one, or one that takes them while it is loaded. Raises
        Unavailable, and InvalidInput if it has another task.
        """
        if self.model is None or not (self.state is ModelState.READY or self.takes(task)):
            raise self._unavailable()
        self.expect(task)
        return self.model

    def takes(self, task: str) -> bool:
        """Whether requests of this task begin while the model is loaded. Calls of single submodels do not: they are
        checked by its engines.
        """
        return self.begun.is_set() and task != ANY

    def begin(self, model: Model) -> None:
        """Take requests for a model whose engines come one after another."""
        if isinstance(model.engines, Arriving):
            model.engines.notify = lambda: self.scheduler.wake()
        self.model = model
        self.begun.set()

    def _unavailable(self) -> Unavailable:
        why = f": {self.error}" if self.error else ""
        error = Unavailable(f"model {self.name} is {self.state.value}{why}. Try again when it is ready, or load it")
        if self.state is ModelState.FAILED:
            error.retry_seconds = max(1.0, self.failed_at + RETRY_SECONDS - monotonic())
        return error

    def enter(self, client: str, nbytes: int, terms: Terms | None = None) -> Reservation:
        """Reserve a place for a request. Raises ResourceExhausted."""
        free, kept = self.limits.slots + self.limits.max_queue - len(self.places), self.limits.max_queue // KEPT
        if free <= 0:
            raise ResourceExhausted(
                f"the queue of model {self.name} is full ({self.limits.max_queue} requests wait): try again later",
                max(SOON, self._seconds_of(1) or SOON),
            )
        if free <= kept and any(place.client == client for place in self.places):
            raise ResourceExhausted(
                f"the last {kept} places in the queue of model {self.name} are kept for other clients: try again later",
                SOON,
            )
        place = Reservation(client, nbytes, terms or Terms())
        self.places.add(place)
        self.vacated.clear()
        return place

    def leave(self, place: Reservation) -> None:
        """Free the place of a request."""
        self.places.discard(place)
        if not self.places:
            self.vacated.set()

    def start(self, id: str, job: Job, place: Reservation, ended: Callable[[Run], None]) -> Run:
        """Queue the job; `ended` is called on the event loop when it is done."""
        loop = asyncio.get_running_loop()
        run = Run(job, place, self.scheduler.changed)
        run.events.put(self._queued(id, run, self._position(len(self.runs))))
        self.runs[run] = id
        self.started += 1

        def done(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server stopped before the job ended
                loop.call_soon_threadsafe(ended, run)

        run.future.add_done_callback(done)
        self.scheduler.submit(run)
        return run

    def ended(self, run: Run) -> None:
        """A request ended: those that wait hear of their new places."""
        del self.runs[run]
        self.leave(run.place)
        if run.error is None and run.started_at is not None:
            self._pace.append(monotonic() - run.started_at)
        waiting = self.scheduler.waiting
        running = len(self.runs) - len(waiting)
        for number, one in enumerate(waiting):
            if one in self.runs and one.position != (position := self._position(running + number)):
                one.events.put(self._queued(self.runs[one], one, position))

    def _position(self, others: int) -> int:
        """How many requests have to end before one starts that came behind so many others."""
        return max(0, others + 1 - self.limits.slots)

    def _queued(self, id: str, run: Run, position: int) -> Queued:
        """The place of a request in the queue, and when it is expected to start."""
        run.position = position
        return Queued(position, self._seconds_of(position), id)

    def _seconds_of(self, count: int) -> float | None:
        """How long it takes until so many requests have ended, as the last ones did; None if nothing is known of it."""
        return count * sum(self._pace) / len(self._pace) / self.limits.slots if count and self._pace else None

    def leave_behind(self) -> Scheduler:
        """Replace the busy thread and return it. It ends with its current work."""
        scheduler, self.scheduler = self.scheduler, self._new_scheduler()
        for run in self.runs:
            self.leave(run.place)
        self.runs.clear()
        return scheduler

    def status(self) -> Status:
        running, loaded = self.scheduler.running, None if self.begun.is_set() else self.model
        placements = tuple(
            SubmodelStatus(name, engine.target, engine.device, precision(engine), engine.fallbacks, engine.chosen)
            for name, engine in (here(self.model.engines) if self.model else {}).items()
        )
        return Status(
            name=self.name,
            state=self.state,
            quant=self.offer.quant,
            task=self.task,
            target=loaded.target if loaded else None,
            device=loaded.device if loaded else None,
            error=self.error,
            running=running,
            queued=max(0, len(self.places) - running),
            placements=placements,
            coming=coming(self.model.engines) if self.model else (),
            notes=self._notes(loaded.notes) if loaded else (),
            version=self.offer.version,
            on_demand=self.on_demand,
            reloading=self.replacing is not None,
            memory=dict(self.memory),
            idle_seconds=_since(self.last_used) if self.idle else None,
            unload_seconds=_until(self.expires) if self.idle else None,
            abilities=self.offer.abilities,
        )


def _since(moment: float | None) -> float | None:
    return None if moment is None else monotonic() - moment


def _until(moment: float | None) -> float | None:
    return None if moment is None else max(0.0, moment - monotonic())
