"""Changes of a model's state: loading, unloading, and loading again when a device was lost.

Every method runs on the server's event loop; engines are loaded and freed in the thread of the model's scheduler. A
thread cannot be ended from outside: one that computes or loads is stopped before its next step. If that takes too long,
it is abandoned, and its engines are freed when it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Final

from runtime import limits
from runtime.errors import EnginecastError, EngineError, InvalidInput, ResourceExhausted, Unavailable
from serving.host.catalog import Catalog
from serving.host.grace import Grace
from serving.host.inference import ANY
from serving.host.job import Model
from serving.host.loading import STOPPING, Loader, Loading
from serving.host.observing import Observer
from serving.host.offers import Offer
from serving.host.residency import KeepAlive, Memory
from serving.host.served import Served
from serving.host.shown import without_paths
from serving.host.states import ModelState

log = logging.getLogger(__name__)

STUCK_SECONDS: Final = 30.0
"""Seconds to wait for the current step of an engine when a model is unloaded. Its thread is abandoned then."""
IDLE_SECONDS: Final = 0.7
"""The same when the server stops."""


class Lifecycle:
    """Changes the state of models. `notify` is called after each change, and `observer` with it; `stopping` is true
    once the server stops.
    """

    def __init__(
        self, catalog: Catalog, loader: Loader, memory: Memory, notify: Callable[[], None], observer: Observer
    ) -> None:
        self.stopping = False
        self.grace = Grace()
        self.keep_alive = KeepAlive(self._unload_idle)
        self._memory = memory
        self._loading = Loading(loader, memory, self._unload_idle, self._begin)
        self._catalog = catalog
        self._notify = notify
        self.observer = observer
        self._stopped = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def loaded(self) -> set[Served]:
        """The models that hold memory."""
        return self._loading.loaded

    def stop(self, grace: float) -> None:
        """The server stops: no request gets more than `grace` seconds from now on, and nothing is loaded for one."""
        self.stopping = self._loading.stopping = True
        self._stopped.set()
        self.keep_alive.close()
        self.grace.begin(grace)
        self._notify()

    def settled(self, served: Served) -> None:
        """Raise Unavailable while a change is under way."""
        if served.change is not None or served.replacing is not None:
            doing = "being reloaded" if served.change is None else served.state.value
            raise Unavailable(f"model {served.name} is {doing}: try again when it is done")

    async def load(self, served: Served, target: str | None = None, keep_alive: float | None = None) -> None:
        """Load a model; without requests it stays for `keep_alive` seconds. If there is no room for it, or if a
        requested `target` fails, its state does not change. Raises Unavailable and the errors of loading.
        """
        self.settled(served)
        before = served.state, served.error
        await self._change(served, ModelState.LOADING, self._load(served, target, keep_alive, before))

    async def use(self, served: Served, task: str = ANY) -> None:
        """Wait until a model takes requests of a task, if it is or may be loaded for one. Otherwise returns at once.

        Raises Unavailable if the server stops, and the errors of loading.
        """
        while served.state is not ModelState.READY and not served.takes(task) and not self.stopping:
            if served.change is not None and not served.withheld:
                await self._join(served, served.change, task)
            elif served.change is None and served.on_demand:
                await self._load_for(served, task)
            else:
                return

    async def _load_for(self, served: Served, task: str) -> None:
        """Load a model until it takes requests of a task."""
        before = served.state, served.error
        change = self._begin_change(served, ModelState.LOADING, self._load(served, None, None, before))
        await self._join(served, change, task)
        if change.done():
            await self._finished(served, change)

    async def unload(self, served: Served, grace: float) -> None:
        """Let the requests of a model finish, stop the rest after `grace` seconds, free its engines. Raises
        Unavailable.
        """
        self.settled(served)
        if served.state is ModelState.READY:
            await self._change(served, ModelState.UNLOADING, self._unload(served, grace))

    async def _unload_idle(self, served: Served) -> None:
        """Unload a model that nothing uses."""
        await self.unload(served, 0)

    async def renew(self, served: Served, offer: Offer) -> None:
        """Load another offer in the place of a model that is ready. The model serves meanwhile; its requests end on it.

        If loading fails, it goes on, with the reason in its status. Raises Unavailable and the errors of loading.
        """
        self.settled(served)
        by = Served(offer, served.limits, self.observer)

        async def work() -> None:
            try:
                await self._load(by, served.target, None, (ModelState.UNLOADED, None))
            except Exception as error:
                served.error = self._shown(served, f"reloading failed, and the model of before goes on: {error}")
                by.scheduler.close()
                raise
            finally:
                served.replacing = None
                self.keep_alive.used(served)
            if self._catalog.replace(served, by):
                by.hidden = False
                self.leave(served, limits.GRACE.most)
            else:  # the model was removed meanwhile
                self.leave(by, 0)

        served.error, by.hidden = None, True
        served.replacing = self._logged(served, work())
        self._notify()
        await self._finished(served, served.replacing)

    def leave(self, served: Served, grace: float) -> None:
        """Unload a model that requests cannot name any more, after the others have ended or `grace` seconds."""
        served.hidden = True
        task = asyncio.create_task(self._leave(served, grace))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, served: Served, grace: float) -> None:
        await served.unchanging()
        if served.places:
            await self.grace.wait(served.vacated.wait(), grace)
        served.withheld = True
        await served.unchanging()  # it may make room for another model now
        with suppress(Exception):  # it is in the log
            await self.unload(served, 0)
        served.scheduler.close()

    async def _join(self, served: Served, change: asyncio.Task[None], task: str) -> None:
        """Wait for a change that another caller began, or until requests of a task begin. Raises its error if loading
        failed, Unavailable if the server stops.
        """
        loading = served.state is ModelState.LOADING
        events = (self._stopped,) if task == ANY else (self._stopped, served.begun)
        others = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait((change, *others), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for other in others:
                other.cancel()
        if self.stopping:
            raise Unavailable(STOPPING)
        if loading and served.state is ModelState.FAILED and isinstance(error := change.exception(), Exception):
            raise served.concealed(error) if isinstance(error, EnginecastError) else error

    def failed(self, served: Served, error: EngineError) -> None:
        """A request ended with an error of an engine: check the engines, as a device may be lost."""
        if served.state is ModelState.READY and served.check is None and not self.stopping:
            served.check = asyncio.create_task(self._check(served, error))

    async def shut(self, served: Served, grace: float) -> bool:
        """Unload a model and return whether that succeeded. Does not wait for what is loading, but for requests that
        run meanwhile.
        """
        if served.begun.is_set() and served.runs:
            await self._drain(served, grace, self._late(served, grace))
        changes = {task for task in (served.change, served.check) if task is not None}
        if changes:
            await asyncio.wait(changes, timeout=IDLE_SECONDS if served.state is ModelState.LOADING else None)
        if served.change is not None:
            log.warning("model %s is still %s: its thread is abandoned", served.name, served.state.value)
            return False
        if served.state is ModelState.READY:
            with suppress(Exception):  # the error was logged
                await self._change(served, ModelState.UNLOADING, self._unload(served, grace))
        return served.model is None and not served.runs and served.replacing is None

    async def _change(self, served: Served, state: ModelState, work: Coroutine[Any, Any, None]) -> None:
        """Run a change to its end, also if the caller leaves: engines of a half loaded model would have no owner."""
        await self._finished(served, self._begin_change(served, state, work))

    def _begin_change(self, served: Served, state: ModelState, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin a change, whose error is logged. The model has `state` from the call on, not only when the work begins:
        a caller that comes between reads it.
        """

        async def settle() -> None:
            try:
                await work
            finally:
                served.change = None  # in one turn with the state: who waits for the state may change it again

        self._become(served, state)
        served.change = self._logged(served, settle())
        return served.change

    def _logged(self, served: Served, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of this work, whose error is logged."""

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

        task = asyncio.create_task(work)
        task.add_done_callback(ended)
        return task

    async def _finished(self, served: Served, task: asyncio.Task[None]) -> None:
        """Wait for a change, which goes on if the caller leaves. Raises its error without paths."""
        try:
            await asyncio.shield(task)
        except InvalidInput:
            raise
        except EnginecastError as error:
            raise served.concealed(error) from error

    async def _check(self, served: Served, error: EngineError) -> None:
        """Run a sample on every engine of a model, and load the model again, elsewhere if possible, if one fails.
        Requests wait meanwhile.
        """
        try:
            model = served.model
            broken = await asyncio.wrap_future(served.scheduler.do(model.broken)) if model else ()
            settled = served.change is None and served.replacing is None
            if broken and served.state is ModelState.READY and served.model is model and settled:
                log.error("model %s: %s cannot run any more: %s", served.name, " and ".join(broken), error)
                with suppress(Exception):  # the error is in the model's status and in the log
                    await self._change(served, ModelState.LOADING, self._reload(served, broken, error))
        finally:
            served.check = None
            self.keep_alive.used(served)

    async def _reload(self, served: Served, broken: Sequence[str], error: EngineError) -> None:
        why = f"{' and '.join(broken)} of model {served.name} stopped working ({error})"
        await self._drain(
            served, 0, Unavailable(f"{why}: the model is being loaded again, send the request again when it is ready")
        )
        model, served.model = served.model, None
        assert model is not None, "a model is ready when it is found broken"
        try:
            served.model = await asyncio.wrap_future(served.scheduler.do(partial(model.elsewhere, broken)))
        except Exception as reason:
            self._become(served, ModelState.FAILED, f"{why}, and it could not be loaded again: {reason}")
            raise
        self._become(served, ModelState.READY)

    def _become(self, served: Served, state: ModelState, error: str | None = None) -> None:
        served.state = state
        served.error = None if error is None else self._shown(served, error)
        if not served.hidden:
            self.observer.changed(served.name, state)
        if state is ModelState.FAILED:
            served.failed_at = monotonic()
        if state in (ModelState.FAILED, ModelState.UNLOADED):
            self._loading.forget(served)
        self._notify()

    def _shown(self, served: Served, error: str) -> str:
        return without_paths(error, served.offer.root, served.name)

    async def _load(
        self,
        served: Served,
        target: str | None,
        keep_alive: float | None,
        before: tuple[ModelState, str | None],
    ) -> None:
        """Load a model. If there is no room for it, or if a requested `target` fails, the state and error `before`
        return.
        """
        try:
            served.model = await self._loading.load(served, target)
        except Exception as error:
            try:
                await self._give_up(served, error)
            finally:
                if target is not None or (isinstance(error, ResourceExhausted) and served not in self.loaded):
                    self._become(served, *before)
                else:
                    self._become(served, ModelState.FAILED, str(error) or type(error).__name__)
            raise
        served.target = target
        served.begun.clear()
        self._become(served, ModelState.READY)
        asyncio.get_running_loop().call_soon(self.keep_alive.loaded, served, keep_alive)

    def _begin(self, served: Served, model: Model) -> None:
        """A model takes requests while its engines come."""
        served.begin(model)
        self._notify()

    async def _give_up(self, served: Served, error: Exception) -> None:
        """Loading failed: requests that wait for an engine get the error, and the engines that came are freed."""
        model, served.model = served.model, None
        served.begun.clear()
        served.asked = ()
        if model is not None:
            why = (
                error
                if isinstance(error, EnginecastError)
                else EngineError(f"{served.name} could not be loaded: {error}")
            )
            idle = await self._drain(served, 0, served.concealed(why))
            await self._free(served, model, idle)

    def _late(self, served: Served, grace: float) -> Unavailable:
        why = "the server is stopping" if self.stopping else f"model {served.name} is being unloaded"
        return Unavailable(f"{why} and the request did not finish within {grace:g} s: send it again later")

    async def _unload(self, served: Served, grace: float) -> None:
        idle = await self._drain(served, grace, self._late(served, grace))
        if served.check is not None:
            _, checking = await asyncio.wait([served.check], timeout=self._patience())
            idle = idle and not checking
        try:
            await self._close(served, idle)
            if not self.stopping:
                await asyncio.to_thread(self._memory.release)
        finally:
            self.keep_alive.forget(served)
            self._become(served, ModelState.UNLOADED)

    async def _close(self, served: Served, idle: bool) -> None:
        """Free the engines of a model."""
        model, served.model = served.model, None
        if model is not None:
            await self._free(served, model, idle)

    async def _free(self, served: Served, model: Model, idle: bool) -> None:
        """Free engines: now if they are `idle`, else when the model's thread has ended its step."""
        scheduler = served.scheduler if idle else served.leave_behind()
        closing = scheduler.do(model.close)
        if idle:
            await asyncio.wrap_future(closing)
        else:
            scheduler.close()

    async def _drain(self, served: Served, grace: float, error: EnginecastError) -> bool:
        """Wait `grace` seconds for the requests of a model, then stop the rest with `error`.

        Returns whether the engines are idle.
        """
        if not served.runs:
            return True
        ending = [asyncio.wrap_future(run.future) for run in served.runs]
        if await self.grace.wait(asyncio.wait(ending), grace):
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
