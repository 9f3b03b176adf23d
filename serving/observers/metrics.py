"""Metrics for Prometheus, served over HTTP. Units and names follow its conventions (https://prometheus.io/docs/practices
/naming/); labels have the values that the server itself knows, never those of clients.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from runtime.errors import Unavailable
from runtime.optional import require
from serving.host.observing import TOTALS, Observer, Record
from serving.host.states import ModelState, Status

PREFIX: Final = "enginecast_"
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper ends of the buckets of a request's times."""
STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""The same for one run of an engine."""
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
PATIENCE: Final = 5.0
"""Seconds that a scrape waits for the event loop."""

Statuses = Callable[[], Sequence[Status]]


class Metrics(Observer):
    """Collects metrics in a registry of its own. Raises MissingDependency without prometheus-client."""

    def __init__(self) -> None:
        self._client = client = require("prometheus_client", "metrics")
        self.registry = registry = client.CollectorRegistry()
        client.ProcessCollector(registry=registry)

        def histogram(name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Any:
            return client.Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)

        self._requests = client.Counter(
            PREFIX + "requests", "Calls that ended.", ("method", "model", "code"), registry=registry
        )
        self._seconds = histogram("request_seconds", "From a request's arrival to its end.", ["model"], SECONDS)
        self._queue = histogram("queue_seconds", "Time in the queue of requests that started.", ["model"], SECONDS)
        self._first = histogram(
            "first_output_seconds", "From a request's arrival to its first output.", ["model"], SECONDS
        )
        self._steps = histogram("step_seconds", "One run of an engine.", ["model", "submodel"], STEP_SECONDS)
        self._batches = histogram("batch_size", "Calls in one run of an engine.", ["model", "submodel"], BATCHES)

    def ended(self, record: Record) -> None:
        self._requests.labels(record.method, record.model, record.code).inc()
        if record.model:
            self._seconds.labels(record.model).observe(record.ended)
        if record.waited is not None:
            self._queue.labels(record.model).observe(record.waited)
        if record.first_output is not None:
            self._first.labels(record.model).observe(record.first_output)

    def ran(self, model: str, submodel: str, calls: int, seconds: float) -> None:
        self._steps.labels(model, submodel).observe(seconds)
        self._batches.labels(model, submodel).observe(calls)

    def watch(self, statuses: Statuses) -> None:
        """Collect the states of models with every scrape. Call it on the event loop, where `statuses` will be called."""
        self.registry.register(_States(self._client, statuses))

    def text(self) -> str:
        """All metrics in the text format of Prometheus."""
        return str(self._client.generate_latest(self.registry).decode())

    @contextmanager
    def served(self, address: str) -> Iterator[int]:
        """Serve the metrics on "host:port", and give the port. Raises Unavailable."""
        host, _, port = address.rpartition(":")
        app = self._client.make_wsgi_app(self.registry)
        try:
            server = make_server(
                host.strip("[]"), int(port), app, self._client.exposition.ThreadingWSGIServer, handler_class=_Quiet
            )
        except OSError as error:
            raise Unavailable(
                f"metrics cannot be served on {address} ({error.strerror}): choose another address with --metrics"
            ) from None
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()


class _Quiet(WSGIRequestHandler):
    """Does not log scrapes, and waits 10 seconds at most for what a client sends."""

    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _States:
    """Collects the statuses of models: a collector of prometheus-client."""

    def __init__(self, client: Any, statuses: Statuses) -> None:
        self._client = client
        self._statuses = statuses
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterator[Any]:
        async def look() -> Sequence[Status]:
            return self._statuses()

        statuses = asyncio.run_coroutine_threadsafe(look(), self._loop).result(PATIENCE)
        yield from self._gauges(statuses)
        for name in TOTALS:
            family = self._client.core.CounterMetricFamily(PREFIX + name, TOTALS[name], labels=["model"])
            for status in statuses:
                family.add_metric([status.name], status.counts.get(name, 0))
            yield family

    def _gauges(self, statuses: Sequence[Status]) -> Iterator[Any]:
        gauge = self._client.core.GaugeMetricFamily
        running = gauge(PREFIX + "requests_running", "Requests that run.", labels=["model"])
        waiting = gauge(PREFIX + "requests_waiting", "Requests in the queue.", labels=["model"])
        states = gauge(PREFIX + "model_state", "1 for the state that a model is in.", labels=["model", "state"])
        for status in statuses:
            running.add_metric([status.name], status.running)
            waiting.add_metric([status.name], status.queued)
            for state in ModelState:
                states.add_metric([status.name, state.value], status.state is state)
        yield from (running, waiting, states)
