"""One model of a server: its bundle, its state, its worker threads and its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from runtime.errors import EnginecastError, InvalidInput, ResourceExhausted, Unavailable
from runtime.pipeline import Event
from serving.dialects.grpc.shown import concealed, without_paths
from serving.host.inference import ANY
from serving.host.job import Done, Job, Model, precision
from serving.host.mailbox import Mailbox
from serving.host.offers import Limits, Offer
from serving.host.states import ModelState, Status, SubmodelStatus

KEPT: Final = 4
"""This fraction of a queue, one place in 4, is reserved for clients that have no request in it."""


@dataclass(frozen=True, eq=False)
class Reservation:
    """The place of a request in a model's queue: its client, and the bytes of its pictures."""

    client: str
    nbytes: int


class Run:
    """A job in a worker thread, as the event loop sees it."""

    def __init__(self, job: Job, place: Reservation, workers: ThreadPoolExecutor) -> None:
        self.job = job
        self.place = place
        self.events = Mailbox()
        self.error: BaseException | None = None
        self.future: Future[None] = workers.submit(self._work)

    def _work(self) -> None:
        try:
            for event in self.job.events():
                self.events.put(event)
        except BaseException as error:  # it is raised again on the event loop, by the reader of the events
            self.error = error
            self.events.end(error)
        else:
            self.events.end()

    def fail(self, error: EnginecastError) -> None:
        """End the reader's events at once, and the work before its next step."""
        self.job.stop(error)
        self.future.cancel()
        self.events.end(error, at_once=True)


class Served:
    """One model: its bundle, its state and its requests. Used on the event loop only."""

    def __init__(self, offer: Offer, allowed: Limits) -> None:
        self.offer = offer
        self.limits = allowed
        self.state = ModelState.UNLOADED
        self.model: Model | None = None
        self.task: str | None = None
        self.error: str | None = None
        self.places: set[Reservation] = set()
        self.runs: set[Run] = set()
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
        """The error as clients see it, without paths."""
        return concealed(error, self.offer.root, self.name)

    def shown(self, event: Event) -> Event:
        """The event as clients see it, without paths."""
        return replace(event, notes=self._notes(event.notes)) if isinstance(event, Done) else event

    def _notes(self, notes: Iterable[str]) -> tuple[str, ...]:
        return tuple(without_paths(note, self.offer.root, self.name) for note in notes)

    def ready(self, task: str) -> Model:
        """The loaded model. Raises Unavailable, and InvalidInput if it has another task (`ANY` is every model's)."""
        if self.state is not ModelState.READY or self.model is None:
            why = f": {self.error}" if self.error else ""
            raise Unavailable(f"model {self.name} is {self.state.value}{why}. Try again when it is ready, or load it")
        if task not in (ANY, self.model.task):
            raise InvalidInput(
                "model", f"{self.name} has the task {self.model.task}, expected a model with the task {task}"
            )
        return self.model

    def enter(self, client: str, nbytes: int) -> Reservation:
        """Reserve a place for a request. Raises ResourceExhausted."""
        free, kept = self.limits.slots + self.limits.max_queue - len(self.places), self.limits.max_queue // KEPT
        if free <= 0:
            raise ResourceExhausted(
                f"the queue of model {self.name} is full ({self.limits.max_queue} requests wait): try again later"
            )
        if free <= kept and any(place.client == client for place in self.places):
            raise ResourceExhausted(
                f"the last {kept} places in the queue of model {self.name} are kept for other clients: try again later"
            )
        place = Reservation(client, nbytes)
        self.places.add(place)
        return place

    def start(self, job: Job, place: Reservation, ended: Callable[[Run], None]) -> Run:
        """Give the job to a worker thread; `ended` is called on the event loop when it is done."""
        loop = asyncio.get_running_loop()
        run = Run(job, place, self.workers)
        self.runs.add(run)

        def done(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server stopped before the job ended
                loop.call_soon_threadsafe(ended, run)

        run.future.add_done_callback(done)
        return run

    def leave_behind(self) -> ThreadPoolExecutor:
        """Replace the busy worker threads and return them. They end with their current work."""
        workers, self.workers = self.workers, self._new_workers()
        for run in self.runs:
            self.places.discard(run.place)
        self.runs.clear()
        return workers

    def status(self) -> Status:
        running = min(len(self.runs), self.limits.slots)
        target, device = (self.model.target, self.model.device) if self.model else (None, None)
        placements = tuple(
            SubmodelStatus(name, engine.target, engine.device, precision(engine), engine.fallbacks, engine.chosen)
            for name, engine in (self.model.engines if self.model else {}).items()
        )
        notes = self._notes(self.model.notes) if self.model else ()
        queued, quant = len(self.places) - running, self.offer.quant
        return Status(
            self.name, self.state, quant, self.task, target, device, self.error, running, queued, placements, notes
        )
