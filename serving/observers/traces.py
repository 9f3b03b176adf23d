"""Traces for OpenTelemetry: a span for each request, inside the client's span if it sent one (`traceparent`), with
spans for its time in the queue, its run and, inside that, the calls of each engine together. Nothing is sent anywhere
but to the endpoint that the settings name. A span holds no text and no picture of a request.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import urlsplit

from runtime.errors import InvalidInput
from runtime.optional import require
from serving.host.job import EngineUse
from serving.host.observing import OK, Observer, Record

EXTRA: Final = "tracing"
FLUSH_SECONDS: Final = 1.0
"""Time for the last spans when the server stops."""
FAULTS: Final = ("UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE")
"""Codes that make a server's span an error, after the semantic conventions of OpenTelemetry."""
TRACE_KEY: Final = "traceparent"


def check_endpoint(endpoint: str) -> None:
    """Raise InvalidInput unless it is the URL of an OTLP collector."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise InvalidInput("traces", f"is '{endpoint}', expected a URL such as http://127.0.0.1:4317 (OTLP over gRPC)")


def otlp(endpoint: str) -> Any:
    """The exporter to an OTLP collector; http:// is without TLS. Raises InvalidInput, MissingDependency."""
    check_endpoint(endpoint)
    exporter = require("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", EXTRA)
    return exporter.OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http:"))


class Traces(Observer):
    """Makes the spans of requests that have ended, and sends them with an exporter of OpenTelemetry's SDK."""

    def __init__(self, exporter: Any) -> None:
        sdk = require("opentelemetry.sdk.trace", EXTRA)
        export = require("opentelemetry.sdk.trace.export", EXTRA)
        resources = require("opentelemetry.sdk.resources", EXTRA)
        self._api = require("opentelemetry.trace", EXTRA)
        self._parents = require("opentelemetry.trace.propagation.tracecontext", EXTRA).TraceContextTextMapPropagator()
        resource = resources.Resource.create({"service.name": "enginecast", "service.version": version("enginecast")})
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("enginecast")

    def close(self) -> None:
        """Send what is left and stop. Spans that a collector does not take in FLUSH_SECONDS are lost."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)

    def ended(self, record: Record) -> None:
        if record.code == OK and not record.model and not record.traceparent:
            return  # checks of health, lists of models
        parent = self._parents.extract({TRACE_KEY: record.traceparent})
        ended = record.ended or 0.0
        span = self._start(record, record.method, 0.0, parent, self._api.SpanKind.SERVER, _facts(record))
        if record.code in FAULTS:
            span.set_status(self._api.StatusCode.ERROR, record.code)
        inside = self._api.set_span_in_context(span, parent)
        if record.queued is not None:
            self._child(record, "queue", record.queued, ended if record.started is None else record.started, inside)
        if record.started is not None:
            self._run(record, record.started, ended, inside)
        span.end(_nanoseconds(record, ended))

    def _run(self, record: Record, started: float, ended: float, parent: Any) -> None:
        run = self._start(record, "run", started, parent)
        inside = self._api.set_span_in_context(run, parent)
        for use in record.engines:
            self._child(record, f"engine {use.submodel}", started, started + use.seconds, inside, _use(use))
        run.end(_nanoseconds(record, ended))

    def _child(
        self, record: Record, name: str, start: float, end: float, parent: Any, facts: Mapping[str, Any] | None = None
    ) -> None:
        self._start(record, name, start, parent, facts=facts).end(_nanoseconds(record, end))

    def _start(
        self, record: Record, name: str, start: float, parent: Any, kind: Any = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kind = kind or self._api.SpanKind.INTERNAL
        return self._tracer.start_span(
            name, context=parent, kind=kind, attributes=facts, start_time=_nanoseconds(record, start)
        )


def _nanoseconds(record: Record, seconds: float) -> int:
    """The time so many seconds after the arrival, since the epoch."""
    return round((record.arrived + seconds) * 1e9)


def _facts(record: Record) -> dict[str, Any]:
    service, _, method = record.method.rpartition("/")
    facts: dict[str, Any] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "enginecast.request_id": record.id,
        "enginecast.code": record.code,
        "enginecast.model": record.model,
        "enginecast.task": record.task,
        "error.type": record.error,
        **{f"enginecast.{name}": count for name, count in record.counts.items()},
    }
    return {name: fact for name, fact in facts.items() if fact != ""}


def _use(use: EngineUse) -> dict[str, Any]:
    """`calls` of an engine, and how long they took together."""
    names = ("target", "device", "precision", "calls", "seconds", "reload_seconds")
    return {f"enginecast.{name}": getattr(use, name) for name in names}
