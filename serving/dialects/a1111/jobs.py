"""The jobs of txt2img and img2img: what is known of each while it runs, and who may stop it."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic

import numpy as np

from runtime import limits
from runtime.errors import InvalidInput, NotFound, quoted
from runtime.pipeline import Event, Progress
from runtime.vision.images import Picture
from serving.dialects.a1111.clients import Client
from serving.host.job import Started


@dataclass(eq=False)
class Job:
    """A job of `count` batches, of which number `number` is drawn, and in it `step` of `steps`. `began` is None while
    it waits. `shown` counts previews. `changed` is set and replaced by a new event with every change.
    """

    id: str
    client: Client
    count: int
    name: str
    timestamp: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y%m%d%H%M%S"))
    began: float | None = None
    number: int = 0
    step: int = 0
    steps: int = 0
    preview: Picture | None = None
    shown: int = -1
    interrupted: bool = False
    skipped: bool = False
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None

    @property
    def progress(self) -> float:
        """The share of the job that is done, 0 to 1."""
        inside = self.step / self.steps if self.steps else 0.0
        return 1.0 if self.ended else min(1.0, (self.number + inside) / self.count)

    @property
    def eta(self) -> float:
        """Seconds until the end, if it goes on as until now; 0 where nothing is known of it."""
        if self.began is None or not self.progress:
            return 0.0
        return (monotonic() - self.began) * (1 / self.progress - 1)

    def note(self, event: Event) -> None:
        """Note what an event says."""
        match event:
            case Started():
                self.began = self.began or monotonic()
            case Progress(step, total, preview):
                self.step, self.steps = step, total
                if preview is not None:
                    self.preview, self.shown = np.asarray(preview, np.uint8), self.shown + 1
        self.notify()

    def next(self, number: int) -> None:
        """Begin a batch."""
        self.number, self.step, self.skipped = number, 0, False
        self.notify()

    def stop(self, skip: bool = False) -> None:
        """Stop the batch that is drawn, and unless it is to be skipped all others."""
        self.interrupted, self.skipped = self.interrupted or not skip, skip
        if self.work is not None:
            self.work.cancel()
        self.notify()

    def notify(self) -> None:
        """Wake those that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """The jobs of all clients: those that run, and the last ones that have ended. Used on the event loop only."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()
        self.began = asyncio.Event()
        """Is set and replaced by a new one when a job begins."""

    @contextmanager
    def job(self, client: Client, id: str | None, count: int, name: str) -> Iterator[Job]:
        """A job while the block runs. Raises InvalidInput for an id that another job of now has."""
        job = Job(id or f"task({uuid.uuid4().hex[:15]})", client, count, name)
        key = client.token, job.id
        if key in self._jobs and not self._jobs[key].ended:
            raise InvalidInput(
                "force_task_id", f"{quoted(job.id)} is that of another job, which still runs: choose another"
            )
        self._jobs[key] = job
        self._jobs.move_to_end(key)
        self.began.set()
        self.began = asyncio.Event()
        try:
            yield job
        finally:
            job.ended, job.preview = True, None
            job.notify()
            self._forget()

    def _forget(self) -> None:
        """Forget the oldest jobs that have ended."""
        ended = [key for key, job in self._jobs.items() if job.ended]
        for key in ended[: -limits.SESSIONS.most]:
            del self._jobs[key]

    def get(self, client: Client, id: str) -> Job | None:
        """The job of this id, None if the token of the client has none."""
        return self._jobs.get((client.token, id))

    def find(self, client: Client, id: str) -> Job:
        """The same. Raises NotFound."""
        if (job := self.get(client, id)) is None:
            raise NotFound(f"there is no job {quoted(id)}: it has ended long ago, or never was")
        return job

    def running(self) -> list[Job]:
        """The jobs that have not ended, the oldest first."""
        return [job for job in self._jobs.values() if not job.ended]

    def own(self, client: Client) -> list[Job]:
        """Those of them that are of this client."""
        return [job for job in self.running() if client.known and job.client.key == client.key]

    def stop(self, client: Client, id: str | None, skip: bool = False) -> None:
        """Stop the job of this id, or every job of this client. Raises NotFound, and InvalidInput for a client that
        cannot be told from others: nobody stops the jobs of others.
        """
        if id is None and not client.known:
            raise InvalidInput(
                "id_task", "is missing, and this client sent no cookie and no token by which its jobs could be known: "
                "send the force_task_id of the job"
            )  # fmt: skip
        for job in self.own(client) if id is None else [self.find(client, id)]:
            job.stop(skip)
