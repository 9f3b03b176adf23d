"""Spans of requests, as a collector gets them over OTLP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext

from runtime.errors import EngineError, InvalidInput
from serving.observers.traces import Traces, check_endpoint, otlp
from tests.fakes.serving import FakeServer, request


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector of OpenTelemetry, as its protocol has it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[Any] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # RPC methods are named by the protocol
        for each in request.resource_spans:
            self.resources.append({one.key: one.value.string_value for one in each.resource.attributes})
            self.spans += [span for scope in each.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> Any:
        """The one span of this name."""
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture
def traces(collector: Collector) -> Iterator[Traces]:
    traces = Traces(otlp(collector.url))
    yield traces
    traces.close()


@pytest.fixture
def server(tmp_path: Path, traces: Traces) -> Iterator[FakeServer]:
    with FakeServer(tmp_path, observers=[traces], ready=True) as server:
        yield server


def facts(span: Any) -> dict[str, Any]:
    """The attributes of a span."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


GENERATE = "enginecast.v1.ImageService/Generate"


def test_a_request_has_its_queue_its_run_and_its_engines(
    server: FakeServer, traces: Traces, collector: Collector
) -> None:
    list(server.client.generate(request(steps=3, prompt="xyzzy")))
    server.stop()
    traces.close()
    root, queue, run, engine = map(collector.named, (GENERATE, "queue", "run", "engine denoiser"))
    assert queue.parent_span_id == run.parent_span_id == root.span_id and engine.parent_span_id == run.span_id
    assert not root.parent_span_id and len({span.trace_id for span in (root, queue, run, engine)}) == 1
    assert root.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano == run.start_time_unix_nano <= engine.end_time_unix_nano
    assert run.end_time_unix_nano == root.end_time_unix_nano >= engine.end_time_unix_nano
    assert facts(root)["enginecast.steps"] == 3 and facts(root)["rpc.method"] == "Generate"
    assert facts(engine)["enginecast.calls"] == 3 and facts(engine)["enginecast.target"] == "fake"
    assert "xyzzy" not in str(collector.spans)
    assert collector.resources[0]["service.name"] == "enginecast"


def test_a_request_is_part_of_the_clients_trace(server: FakeServer, traces: Traces, collector: Collector) -> None:
    """The Python client sends the span that is active."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with tracer.start_as_current_span("mine") as mine:
        list(server.client.generate(request(steps=1)))
    server.stop()
    traces.close()
    context: SpanContext = mine.get_span_context()
    span = collector.named(GENERATE)
    assert int.from_bytes(span.trace_id) == context.trace_id and int.from_bytes(span.parent_span_id) == context.span_id


def test_a_failed_request_is_an_error_and_a_refused_one_is_not(
    server: FakeServer, traces: Traces, collector: Collector
) -> None:
    server.draw.failure = EngineError("lost")
    for wanted in (request(steps=1), request(model="none")):
        with pytest.raises(Exception, match=r"lost|not served"):
            list(server.client.generate(wanted))
    server.client.models()
    server.stop()
    traces.close()
    codes = {facts(span)["enginecast.code"]: span.status.code for span in collector.spans if span.name == GENERATE}
    assert codes == {"INTERNAL": 2, "NOT_FOUND": 0}
    assert not [span for span in collector.spans if "ListModels" in span.name]


def test_a_collector_that_is_not_there_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.observers.traces.FLUSH_SECONDS", 0.1)
    traces = Traces(otlp("http://127.0.0.1:9"))
    with FakeServer(tmp_path, observers=[traces], ready=True) as server:
        assert server.alive()
    began = time.monotonic()
    traces.close()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("endpoint", ["collector:4317", "http://", "ftp://collector", "http://name:secret@collector"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(InvalidInput, match=r"traces: is .*expected a URL such as"):
        check_endpoint(endpoint)
