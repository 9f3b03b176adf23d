"""The requests of the pages that are open, so that each can stop its own and no other's."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

from runtime.errors import Cancelled, EnginecastError
from runtime.pipeline import Event
from runtime.task import Request
from serving.host.job import Queued
from serving.page.backend import Backend, Visitor


@dataclass(eq=False)
class Run:
    """One request: the page and the tab that it is of, and its id once it is known."""

    session: str
    tab: str
    id: str = ""
    stopped: bool = False


class Runs:
    """The requests under way. `session` is what Gradio names an open page by, a number that only the page knows."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._running: set[Run] = set()

    async def events(self, visitor: Visitor, tab: str, model: str, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request. Raises its errors, and Cancelled where it was stopped."""
        run = Run(visitor.session, tab)
        self._running.add(run)
        try:
            async with aclosing(self._backend.run(model, request, visitor)) as events:
                async for event in events:
                    if isinstance(event, Queued):
                        run.id = event.id
                    if run.stopped:
                        raise Cancelled("it was stopped")
                    yield event
        finally:
            self._running.discard(run)

    async def stop(self, session: str, tab: str = "") -> None:
        """Stop the requests of a page, or of one of its tabs. One that waits for its model to be loaded stops then."""
        for run in [run for run in self._running if run.session == session and tab in ("", run.tab)]:
            run.stopped = True
            with suppress(EnginecastError):  # it has ended meanwhile
                if run.id:
                    await self._backend.stop(run.id)
