"""A request on its way: the scheduler of its model drives it, the event loop reads its events."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

from runtime.errors import EnginecastError
from runtime.pipeline import Call, Event, Outputs
from serving.host.job import Job, Queued, Started
from serving.host.mailbox import Mailbox
from serving.host.terms import Priority, Terms

PATIENCE: Final = 60.0
"""Seconds that a request waits before it counts as urgent, so that none waits for ever."""


@dataclass(frozen=True, eq=False)
class Reservation:
    """The place of a request in a model's queue: its client, the bytes of its pictures, and its terms."""

    client: str
    nbytes: int
    terms: Terms = field(default_factory=Terms)


class Run:
    """A job and the reader of its events. Made on the event loop, where `event` is called; `fail` may be called from
    any thread, the other methods only by the scheduler.

    `changed` is called when it may go on or was stopped. `future` is done when no more work is done for it; `error` is
    then how it ended. `call` is the engine call that it waits for, and `fed` how many positions of it were run.
    `position` is the place in the queue that its client knows.
    """

    def __init__(self, job: Job, place: Reservation, changed: Callable[[Run], None]) -> None:
        self.job, self.place = job, place
        self.events = Mailbox(lambda: changed(self))
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # whoever stops waiting for it does not end it
        self.error: BaseException | None = None
        self.call: Call | None = None
        self.fed = 0
        self.position: int | None = None
        self.queued_at = monotonic()
        self.started_at: float | None = None
        self._started = False
        self._items = job.items()
        self._unread: Event | None = None

    @property
    def client(self) -> str:
        return self.place.client

    @property
    def priority(self) -> Priority:
        """How soon it is run. One that has waited for long is urgent."""
        return Priority.URGENT if monotonic() - self.queued_at > PATIENCE else self.place.terms.priority

    async def event(self) -> Event | None:
        """The next event for the reader, None at the end. Raises how the request ended.

        Its place in the queue is told from the event loop while the scheduler may start it: a place that comes behind
        the start is left out.
        """
        while (event := await self.events.get()) is not None and self._started and isinstance(event, Queued):
            pass
        self._started = self._started or isinstance(event, Started)
        return event

    def fail(self, error: EnginecastError) -> None:
        """End the reader's events at once, and the work before its next step."""
        self.job.stop(error)
        self.events.end(error, at_once=True)

    def advance(self, outputs: Outputs | None = None) -> None:
        """Continue the pipeline up to its next call, or up to a picture for which the reader has no room yet."""
        self.call = None
        try:
            while self._unread is None or self.events.put(self._unread):
                self._unread, item = None, self._items.send(outputs)
                outputs = None
                if isinstance(item, Call):
                    self.call, self.fed = item, 0
                    return
                self._unread = item
        except StopIteration:
            self._finish(None)
        except BaseException as error:  # it is raised again on the event loop, by the reader of the events
            self._finish(error)

    def end(self, error: BaseException | None) -> None:
        """Give up the work."""
        try:
            self._items.close()
        finally:
            self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        self.call, self.error = None, error
        self.future.set_result(None)  # first: a reader that has come to the end finds it done
        self.events.end(error)
