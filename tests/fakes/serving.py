"""The shipped fake server with what only these tests look at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from enginecast.testing import server
from enginecast.testing.server import FakeAnswers, FakeModel, bundle
from serving.enginecast_pb import image_pb2
from serving.host.observing import Observer, Record

__all__ = ["Ended", "FakeAnswers", "FakeModel", "FakeServer", "bundle", "note_requests", "request", "until"]


class FakeServer(server.FakeServer):
    def busy(self, name: str = "draw") -> int:
        """Requests running or waiting."""
        status = self.host.status(name)
        return status.running + status.queued

    def leaving(self, name: str = "draw") -> bool:
        """Whether every request of a model is stopping."""
        return all(run.job.stopped_by is not None for run in self.host.catalog.find(name).runs)

    def alive(self) -> bool:
        """Whether a picture can be drawn from beginning to end."""
        self.draw.release()
        self.draw.failure = None
        return list(self.client.generate(request(steps=2), timeout=10))[-1].HasField("done")


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that happens on another thread."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.005)


def request(**fields: Any) -> image_pb2.GenerateRequest:
    return image_pb2.GenerateRequest(**{"model": "draw", "prompt": "a circle", **fields})


def note_requests(model: Any, requests: list[Any]) -> None:
    """Put the requests that a model gets from now on into a list."""
    pipeline = model.pipeline

    def noting(request: Any) -> Any:
        requests.append(request)
        return pipeline(request)

    model.pipeline = noting


class Ended(Observer):
    """Keeps the record of every call that ended, of those whose method begins with `method`."""

    def __init__(self, method: str = "") -> None:
        self.records: list[Record] = []
        self._method = method

    def ended(self, record: Record) -> None:
        if record.method.startswith(self._method):
            self.records.append(record)
