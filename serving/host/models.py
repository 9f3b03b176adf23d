"""The models of a server, without any protocol: loading, queueing, running and stopping.

Every method runs on one event loop; the engines of a model run in its scheduler's thread. `Limits.slots` requests run
on a model at once; others wait in a bounded queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any
from uuid import uuid4

from runtime import limits as bounds
from runtime.bundle.manifest import Bundle
from runtime.engine import Engine, targets
from runtime.errors import (
    SOON,
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
from runtime.pipeline import Event
from runtime.scripting import Scripts
from runtime.task import Request
from serving.host.catalog import Catalog
from serving.host.following import Follower
from serving.host.inference import ANY, pipeline_of
from serving.host.job import Job
from serving.host.lifecycle import IDLE_SECONDS, Lifecycle
from serving.host.loading import STOPPING, Loader
from serving.host.observing import Counts, Observer, Observers, observed
from serving.host.offers import Limits, Offer
from serving.host.repository import Repository
from serving.host.residency import Memory
from serving.host.results import Results
from serving.host.run import Reservation, Run
from serving.host.served import Served
from serving.host.states import ModelState, Status
from serving.host.terms import Terms
from serving.host.turns import Turns

log = logging.getLogger(__name__)


class ModelHost:
    """Holds models by name and runs requests on them. At first no model is loaded. `observers` are called with
    everything that happens.

    `scripts` are what requests may name, by default the installed ones without folders.

    When the state of a model changes, `changed` is set and replaced by a new event. Raises InvalidInput for names that
    are invalid or used twice.
    """

    def __init__(
        self,
        bundles: Iterable[Bundle | Offer],
        loader: Loader,
        limits: Limits | None = None,
        observers: Sequence[Observer] = (),
        memory: Memory | None = None,
        versions: Mapping[str, str] | None = None,
        scripts: Scripts | None = None,
    ) -> None:
        self.scripts = scripts or Scripts()
        self.limits = limits or Limits()
        self.counts = Counts()
        self.observer: Observer = Observers([self.counts, *observers])
        self.observer.watch(self.statuses)
        self.changed = asyncio.Event()
        self.catalog = Catalog(versions)
        self.lifecycle = Lifecycle(self.catalog, loader, memory or Memory(), self._notify, self.observer)
        self._followers: list[Follower] = []
        self._turns = Turns(bounds.CHECKED.most)
        self._results = Results()
        self._checks = ThreadPoolExecutor(bounds.CHECKS.most, thread_name_prefix="checks")
        for bundle in bundles:
            offer = bundle if isinstance(bundle, Offer) else Offer(bundle.name, bundle.root, bundle)
            self.catalog.add(Served(offer, self.limits, self.observer))

    @property
    def stopping(self) -> bool:
        """Whether the server stops."""
        return self.lifecycle.stopping

    @property
    def follows(self) -> bool:
        """Whether there is a repository, whose models may come at any time."""
        return bool(self._followers)

    def follow(self, repository: Repository) -> None:
        """Serve the bundles of a repository, and follow its changes until the host is closed. Needs a running event
        loop. Raises OSError if the repository cannot be read.
        """
        follower = Follower(repository, self.catalog, self.lifecycle, self.limits, self._notify)
        follower.start()
        self._followers.append(follower)

    @property
    def repository(self) -> Repository | None:
        """The folder whose bundles are served and followed, if there is one."""
        return self._followers[0].repository if self._followers else None

    async def look(self) -> None:
        """Serve the repository as it is now, without waiting until it is looked through anyway."""
        for follower in self._followers:
            await follower.look()

    def status(self, name: str) -> Status:
        """The status of a model. Raises NotFound with the nearest name."""
        served = self.catalog.find(name)
        return replace(served.status(), counts=self.counts.of(served.name), is_default=self.catalog.is_default(served))

    def statuses(self) -> list[Status]:
        """The status of every model, sorted by name."""
        return [self.status(served.name) for served in self.catalog]

    def at_start(self) -> list[str]:
        """The names of the models to load when the server starts."""
        return [served.name for served in self.catalog if not served.offer.followed]

    def ready(self) -> dict[str, str | None]:
        """The task of each model, None if it cannot be used now: it is not loaded, and a request would not load it.

        Models that are loaded when the server starts count only while they are loaded. A model with versions is there
        under its name, too, with its default version.
        """
        named = {served.name: served for served in self.catalog} | self.catalog.defaults()
        return {name: served.task if self._usable(served) else None for name, served in named.items()}

    def _usable(self, served: Served) -> bool:
        waits = served.on_demand and served.offer.followed
        return (served.state is ModelState.READY or waits) and not self.stopping

    def engines(self, name: str) -> Mapping[str, Engine]:
        """The engine of each submodel of a loaded model. Raises NotFound, Unavailable."""
        return self.catalog.find(name).ready(ANY).engines

    def run(
        self,
        name: str,
        request: Request,
        timeout: float | None = None,
        client: str = "",
        terms: Terms | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Run a request: yields `Queued`, `Started`, the pipeline's events and `Done`. Closing the generator stops the
        work before its next step, unless the `terms` let it finish.

        A model that is not loaded is loaded first. `client` names the connection that sent the request. Raises
        NotFound, Unavailable, InvalidInput, ResourceExhausted, DeadlineExceeded after `timeout` seconds, and the errors
        of the engine.
        """
        known = self.catalog.find(name).name if name in self.catalog else ""
        terms, id = terms or Terms(), uuid4().hex
        events = within_memory(self._run(id, name, request, timeout, client, terms))
        if terms.finish:
            events = self._results.kept(id, request.task, events)
        return observed(events, self.observer, known, request.task)

    def collect(self, id: str, task: str) -> AsyncGenerator[Event, None]:
        """The events of a request of this task whose terms let it finish, from the first on. Raises NotFound and the
        error of the request.
        """
        return self._results.collect(id, task)

    def stop(self, id: str) -> None:
        """Stop a request before its next step. Raises NotFound for one that has ended or never was."""
        runs = [run for served in self.catalog for run, known in served.runs.items() if known == id]
        if not runs:
            raise NotFound(f"no request {quoted(id)} runs or waits: it has ended, or never was")
        runs[0].fail(Cancelled("the request was stopped by its id"))

    async def _run(
        self, id: str, name: str, request: Request, timeout: float | None, client: str, terms: Terms
    ) -> AsyncGenerator[Event, None]:
        served = self.catalog.find(name)
        self._open()
        served.expect(request.task)
        place = self._enter(served, client, request.nbytes, terms)
        left = await self._loaded(served, place, timeout, request.task)
        job = await self._job(served, request, place)
        run = served.start(id, job, place, partial(self._ended, served))
        over = DeadlineExceeded(
            f"the request was not done after {timeout or 0:.3g} s: allow it more time or request less work"
        )
        timer = None if left is None else asyncio.get_running_loop().call_later(left, run.fail, over)
        try:
            while (event := await run.event()) is not None:
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
            if run.future.done():
                self._ended(served, run)  # now, so that whoever has the whole answer finds the place free

    def _enter(self, served: Served, client: str, nbytes: int, terms: Terms) -> Reservation:
        held = sum(place.nbytes for other in self.catalog for place in other.places)
        if nbytes and held + nbytes > bounds.WAITING_BYTES.most:
            raise ResourceExhausted(
                "the pictures of requests that wait take all the memory there is for them: try again later", SOON
            )
        return served.enter(client, nbytes, terms)

    def _left(self, served: Served, place: Reservation) -> None:
        """Free the place of a request."""
        served.leave(place)
        self.lifecycle.keep_alive.used(served, place.terms.keep_alive)

    async def _loaded(self, served: Served, place: Reservation, timeout: float | None, task: str) -> float | None:
        """Wait until a model takes requests of a task, and return what is left of the timeout. Frees the place if that
        fails.
        """
        began = monotonic()
        try:
            async with asyncio.timeout(timeout):
                await self.lifecycle.use(served, task)
        except TimeoutError:
            self._left(served, place)
            raise DeadlineExceeded(
                f"model {served.name} was not loaded after {timeout or 0:.3g} s: allow the request more time, or load "
                "the model before"
            ) from None
        except BaseException:
            self._left(served, place)
            raise
        return None if timeout is None else max(0.0, timeout - (monotonic() - began))

    async def _job(self, served: Served, request: Request, place: Reservation) -> Job:
        """Check (tokenize) a request in a thread and return its job.

        If the check fails or the caller leaves, the place is freed only when the check has ended, so that all work of
        a client counts.
        """

        async def check() -> Any:
            async with self._turns(place.client):
                return await asyncio.get_running_loop().run_in_executor(
                    self._checks, pipeline_of, served.ready(request.task), request, self.scripts
                )

        checked = asyncio.create_task(check())
        try:
            pipeline = await asyncio.shield(checked)
            return Job(served.ready(request.task), pipeline)
        except BaseException:

            def leave(task: asyncio.Future[Any]) -> None:
                self._left(served, place)
                if not task.cancelled():
                    task.exception()  # it was raised already, or the caller has left

            checked.add_done_callback(leave)
            raise

    async def load(self, name: str, target: str | None = None, keep_alive: float | None = None) -> None:
        """Load a model. Loading continues if the caller leaves. Raises NotFound, Unavailable, InvalidInput and the
        errors of loading.

        If loading on a requested `target` fails, the state of the model does not change. Without requests it stays
        loaded for `keep_alive` seconds.
        """
        served = self.catalog.find(name)
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
        served.withheld = False
        await self.lifecycle.load(served, target, keep_alive)

    async def keep(self, name: str, seconds: float | None = None) -> None:
        """Load a model without a request and let it stay for `seconds`, None for its usual time. 0 unloads it if
        nothing uses it; the next request loads it again. Raises NotFound, Unavailable, the errors of loading, and
        InvalidInput for 0 if it always stays.
        """
        served = self.catalog.find(name)
        self._open()
        if seconds != 0:
            await self.lifecycle.use(served)
            served.ready(ANY)
            self.lifecycle.keep_alive.used(served, seconds)
        elif served.offer.keep_alive is None:
            raise InvalidInput(
                "keep_alive", f"is 0, and {served.name} always stays loaded: start the server with --keep-alive"
            )
        elif served.places:
            raise Unavailable(f"model {served.name} is in use: unload it when its requests have ended")
        else:
            await self.lifecycle.unload(served, 0)

    async def reload(self, name: str) -> None:
        """Load the bundle that is in a model's folder now. A model that is ready serves until the new one is, and goes
        on if that fails; its requests end on it. Raises NotFound, Unavailable and the errors of loading.
        """
        served = self.catalog.find(name)
        self._open()
        self.lifecycle.settled(served)
        offer = await asyncio.to_thread(served.offer.again)
        self.lifecycle.settled(served)
        if offer.error is not None:
            raise served.concealed(offer.error)
        served.withheld = False
        if served.state is ModelState.READY:
            await self.lifecycle.renew(served, offer)
        else:
            served.take(offer)
            await self.lifecycle.load(served)

    async def unload(self, name: str, grace: float | None = None) -> None:
        """Let the requests of a model finish, stop the rest after `grace` seconds, then free its engines. Requests do
        not load it again. Raises NotFound, Unavailable.
        """
        served = self.catalog.find(name)
        self.lifecycle.settled(served)
        served.withheld = True
        await self.lifecycle.unload(served, self.limits.grace_seconds if grace is None else grace)

    async def close(self, grace: float | None = None) -> bool:
        """Refuse new requests, let the others finish, stop the rest after `grace` seconds and free all engines.

        Takes at most `grace` and IDLE_SECONDS. Returns False if a thread still loads or computes; it is abandoned.
        """
        grace = self.limits.grace_seconds if grace is None else grace
        for follower in self._followers:
            follower.close()
        self.lifecycle.stop(grace)
        models = {*self.catalog, *self.lifecycle.loaded}
        shut = asyncio.gather(*(self.lifecycle.shut(served, grace) for served in models))
        try:
            free = all(await asyncio.wait_for(shut, grace + IDLE_SECONDS))
        except TimeoutError:
            free = False
        for served in models:
            served.scheduler.close()
        self._checks.shutdown(wait=False)
        return free

    def _open(self) -> None:
        if self.stopping:
            raise Unavailable(STOPPING)

    def _ended(self, served: Served, run: Run) -> None:
        """Free a request's place, once. If its engine failed, check the engines: a device may be lost."""
        if run not in served.runs:
            return
        served.ended(run)
        self.lifecycle.keep_alive.used(served, run.place.terms.keep_alive)
        if isinstance(run.error, EngineError):
            self.lifecycle.failed(served, run.error)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


async def within_memory(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The events of a request. Raises ResourceExhausted where there was no memory for it."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except MemoryError as error:
            log.warning("a request ended without memory: %s", error)
            raise ResourceExhausted(
                "the server has not enough memory for this request: request less at once, or try again later"
            ) from error
