"""Changes of a model's state: loading, unloading, and loading again when a device was lost.

Every method runs on the server's event loop; engines are loaded and freed in the model's worker threads. A thread
cannot be ended from outside: one that computes or loads is stopped before its next step. If that takes too long, it is
abandoned, and its engines are freed when it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from runtime.bundle.manifest import Bundle
from runtime.errors import EnginecastError, EngineError, InvalidInput, Unavailable
from serving.dialects.grpc.shown import without_paths
from serving.host.job import Model
from serving.host.observing import Observer
from serving.host.served import Served
from serving.host.states import ModelState

log = logging.getLogger(__name__)

Loader = Callable[[Bundle | Path, str | None], Model]
"""Loads a bundle for a target, None for the best usable one. Takes the bundle that was opened, or its folder if that
failed.
"""
STUCK_SECONDS: Final = 30.0
"""Seconds to wait for the current step of an engine when a model is unloaded. Its thread is abandoned then."""
IDLE_SECONDS: Final = 0.7
"""The same when the server stops."""


class Grace:
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


class Lifecycle:
    """Changes the state of models. `notify` is called after each change, and `observer` with it; `stopping` is true
    once the server stops.
    """

    def __init__(self, loader: Loader, notify: Callable[[], None], observer: Observer) -> None:
        self.stopping = False
        self.grace = Grace()
        self._loader = loader
        self._notify = notify
        self._observer = observer

    def stop(self, grace: float) -> None:
        """The server stops: no request gets more than `grace` seconds from now on."""
        self.stopping = True
        self.grace.begin(grace)
        self._notify()

    def settled(self, served: Served) -> None:
        """Raise Unavailable while a change is under way."""
        if served.change is not None:
            raise Unavailable(f"model {served.name} is {served.state.value}: try again when it is done")

    async def load(self, served: Served, target: str | None) -> None:
        """Load a model. If a requested `target` fails, its state does not change. Raises Unavailable and the errors of
        loading.
        """
        self.settled(served)
        before = served.state, served.error
        await self._change(served, ModelState.LOADING, self._load(served, target, before))

    async def unload(self, served: Served, grace: float) -> None:
        """Let the requests of a model finish, stop the rest after `grace` seconds, free its engines. Raises
        Unavailable.
        """
        self.settled(served)
        if served.state is ModelState.READY:
            await self._change(served, ModelState.UNLOADING, self._unload(served, grace))

    def failed(self, served: Served, error: EngineError) -> None:
        """A request ended with an error of an engine: check the engines, as a device may be lost."""
        if served.state is ModelState.READY and served.check is None and not self.stopping:
            served.check = asyncio.create_task(self._check(served, error))

    async def shut(self, served: Served, grace: float) -> bool:
        """Unload a model and return whether that succeeded. Does not wait for a model that is loading."""
        changes = {task for task in (served.change, served.check) if task is not None}
        if changes:
            await asyncio.wait(changes, timeout=IDLE_SECONDS if served.state is ModelState.LOADING else None)
        if served.change is not None:
            log.warning("model %s is still %s: its thread is abandoned", served.name, served.state.value)
            return False
        with suppress(Exception):  # the error was logged
            await self.unload(served, grace)
        return served.model is None and not served.runs

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
        self._observer.changed(served.name, state)
        self._notify()

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
        if await self.grace.wait([run.future for run in served.runs], grace):
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
