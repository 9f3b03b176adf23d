"""The models of a server, without any protocol: loading, queueing, running and stopping.

Every method runs on one event loop; engines run in worker threads. By default one request at a time runs on a model
(`Limits.slots`); others wait in a bounded queue. A driver that batches replaces `drive` and needs more slots.

A thread cannot be ended from outside. A thread that computes or loads is stopped before its next step. If that takes
too long, the thread is abandoned: its engines are freed when it ends, and a stopping process does not wait for it
(`ModelHost.close`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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
from serving.dialects.grpc.shown import without_paths
from serving.host.job import Driver, Job, Model, Queued
from serving.host.offers import Limits, Offer, check_name
from serving.host.served import Reservation, Run, Served
from serving.host.states import ModelState, Status
from serving.host.turns import Turns

log = logging.getLogger(__name__)

Loader = Callable[[Bundle | Path, str | None], Model]
"""Loads a bundle for a target, None for the best usable one. Takes the bundle that was opened, or its folder if that
failed.
"""
STUCK_SECONDS: Final = 30.0
"""Seconds to wait for the current step of an engine when a model is unloaded. Its thread is abandoned then."""
IDLE_SECONDS: Final = 0.7
"""The same when the server stops."""


class _Grace:
    """Waits for requests during a grace period. The server's own grace period ends all others."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    def begin(self, seconds: float) -> None:
        """The server stops: all grace periods end within this time."""
        asyncio.get_running_loop().call_later(seconds, self._over.set)

    async def wait(self, futures: Collection[Future[None]], seconds: float) -> bool:
        """Wait `seconds`, or less if the server stops, and return whether all futures are done."""
        if not futures:
            return True
        over = asyncio.create_task(self._over.wait())
        done = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        try:
            await asyncio.wait((over, done), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return done.done()
        finally:
            over.cancel()


class ModelHost:
    """Holds models by name and runs requests on them. At first no model is loaded.

    When the state of a model changes, `changed` is set and replaced by a new event. Raises InvalidInput for names that
    are invalid or used twice.
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
        self._models: dict[str, Served] = {}
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
            self._models[offer.name] = Served(offer, self.limits)

    def status(self, name: str) -> Status:
        """The status of a model. Raises NotFound with the nearest name."""
        return self._find(name).status()

    def statuses(self) -> list[Status]:
        """The status of every model, sorted by name."""
        return [self._models[name].status() for name in sorted(self._models)]

    def ready(self) -> dict[str, str | None]:
        """The task of each model, None if it cannot be used now."""
        usable = {name: served.state is ModelState.READY and not self.stopping for name, served in self._models.items()}
        return {name: self._models[name].task if can else None for name, can in usable.items()}

    async def run(
        self, name: str, request: Request, timeout: float | None = None, client: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Run a request: yields `Queued`, `Started`, the pipeline's events and `Done`. Closing the generator stops the
        work before its next step.

        `client` names the connection that sent it. Raises NotFound, Unavailable, InvalidInput, ResourceExhausted,
        DeadlineExceeded after `timeout` seconds, and the errors of the engine.
        """
        served = self._find(name)
        self._open()
        served.ready(request.task)
        place = self._enter(served, client, request.nbytes)
        job = await self._job(served, request, place)
        position = len(served.runs)
        run = served.start(job, place, partial(self._ended, served))
        over = DeadlineExceeded(
            f"the request was not done after {timeout or 0:.3g} s: allow it more time or request less work"
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

    def _enter(self, served: Served, client: str, nbytes: int) -> Reservation:
        held = sum(place.nbytes for other in self._models.values() for place in other.places)
        if nbytes and held + nbytes > bounds.WAITING_BYTES.most:
            raise ResourceExhausted(
                "the pictures of requests that wait take all the memory there is for them: try again later"
            )
        return served.enter(client, nbytes)

    async def _job(self, served: Served, request: Request, place: Reservation) -> Job:
        """Check (tokenize) a request in a thread and return its job.

        If the check fails or the caller leaves, the place is freed only when the check has ended, so that all work of
        a client counts.
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
                    task.exception()  # it was raised already, or the caller has left

            checked.add_done_callback(leave)
            raise

    async def load(self, name: str, target: str | None = None) -> None:
        """Load a model. Loading continues if the caller leaves. Raises NotFound, Unavailable, InvalidInput and the
        errors of loading.

        If loading on a requested `target` fails, the state of the model does not change.
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
        before = served.state, served.error
        await self._change(served, ModelState.LOADING, self._load(served, target, before))

    async def unload(self, name: str, grace: float | None = None) -> None:
        """Let the requests of a model finish, stop the rest after `grace` seconds, then free its engines. Raises
        NotFound, Unavailable.
        """
        served = self._find(name)
        self._settled(served)
        if served.state is ModelState.READY:
            grace = self.limits.grace_seconds if grace is None else grace
            await self._change(served, ModelState.UNLOADING, self._unload(served, grace))

    async def close(self, grace: float | None = None) -> bool:
        """Refuse new requests, let the others finish, stop the rest after `grace` seconds and free all engines.

        Takes at most `grace` and IDLE_SECONDS. Returns False if a thread still loads or computes; it is abandoned.
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

    async def _shut(self, served: Served, grace: float) -> bool:
        """Unload a model and return whether that succeeded. Does not wait for a model that is loading."""
        changes = {task for task in (served.change, served.check) if task is not None}
        if changes:
            await asyncio.wait(changes, timeout=IDLE_SECONDS if served.state is ModelState.LOADING else None)
        if served.change is not None:
            log.warning("model %s is still %s: its thread is abandoned", served.name, served.state.value)
            return False
        with suppress(Exception):  # the error was logged
            await self.unload(served.name, grace)
        return served.model is None and not served.runs

    def _find(self, name: str) -> Served:
        if not name:
            raise InvalidInput("model", f"is missing: name one of {', '.join(sorted(self._models))}")
        if name not in self._models:
            raise NotFound(f"model {quoted(name)} is not served here: {did_you_mean(name, self._models)}")
        return self._models[name]

    def _open(self) -> None:
        if self.stopping:
            raise Unavailable("the server is stopping: try again when it runs again")

    def _settled(self, served: Served) -> None:
        if served.change is not None:
            raise Unavailable(f"model {served.name} is {served.state.value}: try again when it is done")

    async def _change(self, served: Served, state: ModelState, work: Coroutine[Any, Any, None]) -> None:
        """Run a change to its end, also if the caller leaves: engines of a half loaded model would have no owner.

        The model has `state` from the call on, not only when the work begins: a caller that comes between reads it.
        """

        async def settle() -> None:
            try:
                await work
            finally:
                served.change = None  # in one turn with the state: who waits for the state may change it again

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                expected = isinstance(error, EnginecastError)
                log.log(
                    logging.INFO if expected else logging.ERROR,
                    "model %s: %s",
                    served.name,
                    error,
                    exc_info=None if expected else error,
                )

        self._become(served, state)
        served.change = asyncio.create_task(settle())
        served.change.add_done_callback(ended)
        try:
            await asyncio.shield(served.change)
        except InvalidInput:
            raise
        except EnginecastError as error:
            raise served.concealed(error) from error

    def _ended(self, served: Served, run: Run) -> None:
        """Free a request's place. If its engine failed, check the engines: a device may be lost."""
        served.runs.discard(run)
        served.places.discard(run.place)
        if (
            isinstance(run.error, EngineError)
            and served.state is ModelState.READY
            and served.check is None
            and not self.stopping
        ):
            served.check = asyncio.create_task(self._check(served, run.error))

    async def _check(self, served: Served, error: EngineError) -> None:
        """Run a sample on every engine of a model, and load the model again, elsewhere if possible, if one fails.
        Requests wait meanwhile.
        """
        try:
            model = served.model
            broken = await asyncio.wrap_future(served.workers.submit(model.broken)) if model else ()
            if broken and served.state is ModelState.READY and served.model is model and served.change is None:
                log.error("model %s: %s cannot run any more: %s", served.name, " and ".join(broken), error)
                with suppress(Exception):  # the error is in the model's status and in the log
                    await self._change(served, ModelState.LOADING, self._reload(served, broken, error))
        finally:
            served.check = None

    async def _reload(self, served: Served, broken: Sequence[str], error: EngineError) -> None:
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

    def _become(self, served: Served, state: ModelState, error: str | None = None) -> None:
        served.state = state
        served.error = None if error is None else without_paths(error, served.offer.root, served.name)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _load(self, served: Served, target: str | None, before: tuple[ModelState, str | None]) -> None:
        """Load a model. If a requested `target` fails, the state and error `before` return."""
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

    async def _unload(self, served: Served, grace: float) -> None:
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

    async def _drain(self, served: Served, grace: float, error: EnginecastError) -> bool:
        """Wait `grace` seconds for the requests of a model, then stop the rest with `error`.

        Returns whether the engines are idle.
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
            log.error("model %s: a request is still in its step: its thread is abandoned", served.name)
        return not pending

    def _patience(self) -> float:
        return IDLE_SECONDS if self.stopping else STUCK_SECONDS
