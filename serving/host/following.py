"""Serves the bundles of a repository and follows its changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from runtime.errors import EnginecastError, InvalidInput
from serving.host.catalog import Catalog
from serving.host.lifecycle import Lifecycle
from serving.host.offers import Limits, Offer
from serving.host.repository import Changes, Repository
from serving.host.served import Served
from serving.host.states import ModelState

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
"""Seconds between two looks at a repository."""
LOOKS: Final = 2
"""A bundle is gone when so many did not find it."""


class Follower:
    """Adds, replaces and removes models as the bundles of a repository change. `notify` is called after each change."""

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        lifecycle: Lifecycle,
        allowed: Limits,
        notify: Callable[[], None],
    ) -> None:
        self.repository = repository
        self._catalog = catalog
        self._lifecycle = lifecycle
        self._limits = allowed
        self._notify = notify
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking = asyncio.Lock()

    def start(self) -> None:
        """Serve what is there, and follow changes from now on. Raises OSError if the repository cannot be read."""
        changes = self.repository.look()
        log.info("the repository %s has %d bundles", self.repository.root, len(changes.offers))
        self._apply(changes)
        self._begin(self._follow())

    def close(self) -> None:
        """Follow no more changes."""
        for task in self._tasks:
            task.cancel()

    async def look(self) -> None:
        """Apply what has changed until now. Raises OSError if the repository cannot be read."""
        for _ in range(LOOKS):
            await self._look()

    async def _look(self) -> None:
        async with self._looking:
            self._apply(await asyncio.to_thread(self.repository.look))

    async def _follow(self) -> None:
        readable = True
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self._look()
                readable = True
            except OSError as error:
                if readable:
                    log.warning("the repository cannot be read, its models stay as they are: %s", error)
                readable = False

    def _apply(self, changes: Changes) -> None:
        for name in changes.gone:
            self._withdraw(name)
        for offer in changes.offers:
            self._offer(offer)
        self._choose_defaults()
        if changes.gone or changes.offers:
            self._notify()

    def _withdraw(self, name: str) -> None:
        served = self._catalog.get(name)
        if served is not None and served.offer.followed:
            log.info("model %s is gone from the repository", name)
            self._catalog.remove(served)
            self._lifecycle.leave(served, self._limits.grace_seconds)

    def _offer(self, offer: Offer) -> None:
        served = self._catalog.get(offer.name)
        if served is None:
            self._add(offer)
        elif served.offer.followed:
            self._begin(self._renew(offer))
        else:
            log.warning("%s is passed over: %s is served by the name %s", offer.root, served.offer.root, offer.name)

    def _add(self, offer: Offer) -> None:
        served = Served(offer, self._limits, self._lifecycle.observer)
        try:
            self._catalog.add(served)
        except InvalidInput as error:  # with its version, the name is too long
            log.warning("%s is passed over: %s", offer.root, error)
            return
        present = self._catalog.default(offer.model)
        if present is not None and present.state is ModelState.READY and self._catalog.may_lead(served):
            self._begin(self._lead(served))

    async def _lead(self, served: Served) -> None:
        """Load a new version before it becomes the default: until then, and if that fails, requests go on to the
        present one.
        """
        with suppress(EnginecastError):  # it is in the log and in the status
            await self._lifecycle.use(served)
        self._choose_defaults()
        self._notify()

    async def _renew(self, offer: Offer) -> None:
        """Serve another bundle by a name that is served."""
        while (served := self._catalog.get(offer.name)) is not None and served.changes:
            await served.unchanging()
        if served is None or (served.state is ModelState.READY and served.offer.same(offer)):
            return
        if served.state is ModelState.READY:
            with suppress(EnginecastError):  # it is in the log and in the status
                await self._lifecycle.renew(served, offer)
        else:
            served.take(offer)
            self._notify()

    def _choose_defaults(self) -> None:
        """Make the highest versions the default ones: at once where none is loaded, else those that are loaded."""
        for served in self._catalog:
            present = self._catalog.default(served.offer.model)
            waits = present is not None and (present.state is ModelState.READY or served.state is ModelState.FAILED)
            if served.state is ModelState.READY or not waits:
                self._catalog.promote(served)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
