"""Loads a model: opens its bundle, makes room in memory, loads its engines and measures what they take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from runtime.bundle.manifest import Bundle
from runtime.errors import ResourceExhausted, Unavailable
from runtime.placing.memory import of_process
from serving.host.job import Model
from serving.host.residency import Memory, Needs, measured
from serving.host.scheduler import Scheduler
from serving.host.served import Served
from serving.host.states import ModelState

log = logging.getLogger(__name__)

Loader = Callable[[Bundle, str | None], Model]
"""Loads a bundle for a target, None for the best usable one. Of a model that has a `rest`, that is called next, in the
same thread, while requests run.
"""
STOPPING: Final = "the server is stopping: try again when it runs again"


class Loading:
    """Loads models into the memory for all of them, and unloads those that nothing uses by `unload`. `loaded` are the
    models that hold memory. `begin` is called with a model that takes requests while its engines come.
    """

    def __init__(
        self,
        loader: Loader,
        memory: Memory,
        unload: Callable[[Served], Coroutine[Any, Any, None]],
        begin: Callable[[Served, Model], None],
    ) -> None:
        self.loaded: set[Served] = set()
        self.stopping = False
        self._loader = loader
        self._memory = memory
        self._unload, self._begin = unload, begin
        self._one_by_one = asyncio.Lock()

    async def load(self, served: Served, target: str | None) -> Model:
        """Load a model. Raises ResourceExhausted if there is no room, before anything is unloaded, Unavailable if the
        server stops, and the errors of loading.
        """
        bundle = await self._opened(served)
        needs = await asyncio.to_thread(self._memory.needs, bundle, target)
        async with self._one_by_one:  # no two loads count on the same memory
            await self._make_room(served, needs.all)
            served.memory = needs.all
            self.loaded.add(served)
        model = await self._engines(served, bundle, target, needs)
        await self._fit_again(served)
        return model

    def forget(self, served: Served) -> None:
        """A model holds no memory any more."""
        self.loaded.discard(served)
        served.memory = {}

    async def _opened(self, served: Served) -> Bundle:
        """The bundle of a model. It is opened again if that failed or if the offer follows its folder. Raises the error
        of opening it.
        """
        if served.offer.bundle is None or served.offer.followed:
            served.offer = await asyncio.to_thread(served.offer.again)
        if served.offer.bundle is None:
            raise served.offer.error or AssertionError("a bundle is opened or there is an error")
        return served.offer.bundle

    async def _make_room(self, served: Served, needs: Mapping[str, int]) -> None:
        """Unload idle models until a further one fits."""
        while (idle := self._memory.surplus(served.name, needs, self.loaded)) is not None:
            log.info("model %s is unloaded: its memory is needed for %s", idle.name, served.name)
            with suppress(Exception):  # it is in the log, and the model has no engines now
                await self._unload(idle)

    async def _engines(self, served: Served, bundle: Bundle, target: str | None, needs: Needs) -> Model:
        """Load the engines, and measure their memory if nothing else happens meanwhile.

        They are loaded in a thread beside the model's own, which runs requests meanwhile.
        """
        await asyncio.to_thread(
            self._memory.release
        )  # else memory that is free in this process would count as that of nobody
        if self.stopping:
            raise Unavailable(STOPPING)
        before, started = of_process() if self._quiet(served) else None, served.started
        thread = Scheduler(f"{served.name} is loaded", 1)
        try:
            model = await asyncio.wrap_future(thread.do(partial(self._loader, bundle, target)))
            if self.stopping:
                await asyncio.to_thread(model.close)
                raise Unavailable(STOPPING)
            if model.rest is not None:
                self._begin(served, model)
                model = await asyncio.wrap_future(thread.do(model.rest))
                if self.stopping and not served.runs:
                    raise Unavailable(STOPPING)  # the model has begun: who began it closes it
        finally:
            thread.close()
        after = of_process() if self._quiet(served) and served.started == started else None
        if before is not None and after is not None:
            served.memory = measured(bundle, needs, after - before)
        return model

    def _quiet(self, served: Served) -> bool:
        others = self.loaded - {served}
        return all(other.state is ModelState.READY and not other.places for other in others)

    async def _fit_again(self, served: Served) -> None:
        """Unload idle models if a loaded one takes more than was estimated. It stays itself, whatever it takes."""
        async with self._one_by_one:
            try:
                await self._make_room(served, dict.fromkeys(served.memory, 0))
            except ResourceExhausted:
                log.warning("all models together hold more than --models-memory since %s was loaded", served.name)
