"""Metrics for Prometheus, served over HTTP. Units and names follow its conventions (https://prometheus.io/docs/practices
/naming/); labels have the values that the server itself knows, never those of clients.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from socket import SOCK_STREAM, getaddrinfo, socket
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from runtime.errors import PermissionDenied, Unauthenticated, Unavailable
from runtime.optional import require
from serving.host.observing import OWN, Observer, Record, Statuses
from serving.host.states import ModelState, Status
from serving.security.addresses import split
from serving.security.gate import Gate
from serving.security.https import Tls
from serving.security.protection import OPEN, Security
from serving.security.scopes import Scope

log = logging.getLogger(__name__)

EXTRA: Final = "metrics"
PREFIX: Final = "enginecast_"
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper ends of the buckets of a request's times."""
STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""The same for one run of an engine."""
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
PATIENCE: Final = 5.0
"""Seconds that a scrape waits for the event loop."""
MOST: Final = 16
"""Connections for metrics at once."""
POLL_SECONDS: Final = 0.1
"""Closing takes as long."""


class Metrics(Observer):
    """Collects metrics in a registry of its own. Raises MissingDependency without prometheus-client."""

    def __init__(self) -> None:
        self._client = client = require("prometheus_client", EXTRA)
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
        """Collect the states of models with every scrape."""
        self.registry.register(_States(statuses))

    @contextmanager
    def served(self, address: str, security: Security = OPEN) -> Iterator[int]:
        """Serve the metrics over HTTP on "host:port", with the TLS and the tokens of the server, and give the
        port. Raises InvalidInput, Unavailable and the errors of the certificate's files.
        """
        security.check(address)
        host, port = split(address)
        try:
            server = make_server(host.strip("[]"), port, self._app(security.gate), _Server, handler_class=_Handler)
        except OSError as error:
            raise Unavailable(
                f"metrics cannot be served on {address} ({error.strerror}): choose another address with --metrics"
            ) from None
        server.tls = Tls(security.tls) if security.tls else None
        threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()

    def _app(self, gate: Gate) -> Any:
        """The WSGI application: any path has the metrics, for tokens with the scope metrics."""
        metrics = self._client.make_wsgi_app(self.registry)

        def app(environ: Any, respond: Any) -> Any:
            def refuse(status: str, why: object, *headers: tuple[str, str]) -> Any:
                respond(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
                return [str(why).encode()]

            try:
                gate.check(Scope.METRICS, environ.get("HTTP_AUTHORIZATION"))
                return metrics(environ, respond)
            except Unauthenticated as error:
                return refuse("401 Unauthorized", error, ("WWW-Authenticate", "Bearer"))
            except PermissionDenied as error:
                return refuse("403 Forbidden", error)
            except TimeoutError:
                return refuse("503 Service Unavailable", "the server is too busy to report on its models: try again")

        return app


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, MOST of them at once; others are closed. The TLS handshake is done in the thread.
    Names of addresses are not looked up: that would ask other machines.
    """

    daemon_threads = True
    tls: Tls | None = None

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.address_family = getaddrinfo(*address, type=SOCK_STREAM)[0][0]
        self._room = threading.Semaphore(MOST)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def get_request(self) -> tuple[socket, Any]:
        connection, address = super().get_request()
        return self.tls.wrap(connection) if self.tls else connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection for metrics from %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    """Waits some seconds at most for what a client sends, and logs no scrapes."""

    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _States:
    """Collects the statuses of models: a collector of prometheus-client."""

    def __init__(self, statuses: Statuses) -> None:
        self._families = require("prometheus_client.metrics_core", EXTRA)
        self._statuses = statuses
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterator[Any]:
        async def look() -> Sequence[Status]:
            return self._statuses()

        statuses = asyncio.run_coroutine_threadsafe(look(), self._loop).result(PATIENCE)
        yield from self._gauges(statuses)
        for name in sorted({name for status in statuses for name in status.counts} - set(OWN)):
            what = f"{name.replace('_', ' ').capitalize()} of all requests."
            family = self._families.CounterMetricFamily(PREFIX + name, what, labels=["model"])
            for status in statuses:
                if name in status.counts:
                    family.add_metric([status.name], status.counts[name])
            yield family

    def _gauges(self, statuses: Sequence[Status]) -> Iterator[Any]:
        gauge = self._families.GaugeMetricFamily
        running = gauge(PREFIX + "requests_running", "Requests that run.", labels=["model"])
        waiting = gauge(PREFIX + "requests_waiting", "Requests in the queue.", labels=["model"])
        states = gauge(PREFIX + "model_state", "1 for the state that a model is in.", labels=["model", "state"])
        memory = gauge(PREFIX + "model_memory_bytes", "Memory of loaded models.", labels=["model", "device"])
        for status in statuses:
            running.add_metric([status.name], status.running)
            waiting.add_metric([status.name], status.queued)
            for state in ModelState:
                states.add_metric([status.name, state.value], status.state is state)
            for device, nbytes in status.memory.items():
                memory.add_metric([status.name, device], nbytes)
        yield from (running, waiting, states, memory)
