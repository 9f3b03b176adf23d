"""Ids of requests over real loopback gRPC, and how calls are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from runtime import limits
from runtime.errors import EngineError, InvalidInput
from serving.enginecast_pb import image_pb2, image_pb2_grpc, model_pb2_grpc
from serving.enginecast_pb.model_pb2 import GetModelRequest
from serving.host.observing import Observer, Record
from tests.fakes.serving import FakeServer, request, until


class Records(Observer):
    def __init__(self) -> None:
        self.all: list[Record] = []

    def ended(self, record: Record) -> None:
        self.all.append(record)


class Recorded(FakeServer):
    """A server whose calls are recorded, and a plain gRPC client of it."""

    def __init__(self, folder: Path) -> None:
        self.records = Records()
        super().__init__(folder, observers=[self.records], ready=True)
        self.channel = grpc.insecure_channel(self.address)
        self.records.all.clear()

    def call(self, wanted: image_pb2.GenerateRequest, *metadata: tuple[str, str]) -> grpc.Call:
        """The ended call."""
        call = image_pb2_grpc.ImageServiceStub(self.channel).Generate(wanted, metadata=metadata, timeout=10)
        with suppress(grpc.RpcError):
            list(call)
        return call

    def last(self) -> Record:
        until(lambda: bool(self.records.all))
        return self.records.all[-1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Recorded]:
    with Recorded(tmp_path) as server:
        yield server
        server.channel.close()


def sent_id(call: grpc.Call) -> str:
    return dict(call.trailing_metadata())["x-request-id"]


def test_the_id_of_a_client_comes_back(server: Recorded) -> None:
    call = server.call(request(steps=1), ("x-request-id", "order-17"), ("traceparent", "00-ab-cd-01"))
    record = server.last()
    assert sent_id(call) == record.id == "order-17" and call.code() is grpc.StatusCode.OK
    assert record.method == "enginecast.v1.ImageService/Generate" and record.traceparent == "00-ab-cd-01"
    assert record.counts == {"steps": 1, "pictures": 1} and record.client.startswith("ipv4:127.0.0.1:")


def test_requests_without_an_id_get_one_each(server: Recorded) -> None:
    ids = {sent_id(server.call(request(steps=1))) for _ in range(3)}
    assert len(ids) == 3 and all(len(each) == 32 for each in ids)


def test_a_refused_request_has_its_id_and_its_error(server: Recorded) -> None:
    call = server.call(request(steps=0), ("x-request-id", "order-18"))
    record = server.last()
    assert sent_id(call) == "order-18" and dict(call.trailing_metadata())["enginecast-error"] == "InvalidInput"
    assert (record.code, record.error, record.model) == ("INVALID_ARGUMENT", "InvalidInput", "")


def test_an_error_has_the_id_of_its_call(server: Recorded) -> None:
    with pytest.raises(InvalidInput) as refused:
        list(server.client.generate(request(steps=0)))
    assert refused.value.request_id == server.last().id


def test_a_longer_id_is_refused(server: Recorded) -> None:
    call = server.call(request(steps=1), ("x-request-id", "x" * (limits.REQUEST_ID.most + 1)))
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT and "x-request-id: has 129" in call.details()
    assert sent_id(call) == server.last().id != "" and len(sent_id(call)) == 32


def test_a_failed_engine_and_a_bug_are_recorded(server: Recorded) -> None:
    server.draw.failure = EngineError("lost")
    assert server.call(request(steps=1)).code() is grpc.StatusCode.INTERNAL
    assert (server.last().code, server.last().error) == ("INTERNAL", "EngineError")
    server.draw.failure = ValueError("a bug")
    assert len(sent_id(server.call(request(steps=1)))) == 32
    until(lambda: len(server.records.all) == 2)
    assert (server.last().code, server.last().error) == ("INTERNAL", "")


def test_a_client_that_leaves_is_recorded(server: Recorded) -> None:
    server.draw.hold()
    call = image_pb2_grpc.ImageServiceStub(server.channel).Generate(request(steps=3))
    next(call)
    call.cancel()
    assert server.last().code == "CANCELLED"
    server.draw.release()


def test_calls_about_models_are_recorded(server: Recorded) -> None:
    stub = model_pb2_grpc.ModelServiceStub(server.channel)
    stub.GetModel(GetModelRequest(name="draw"))
    with pytest.raises(grpc.RpcError):
        stub.GetModel(GetModelRequest(name="none"))
    until(lambda: len(server.records.all) == 2)
    assert [(each.method, each.code) for each in server.records.all] == [
        ("enginecast.v1.ModelService/GetModel", "OK"),
        ("enginecast.v1.ModelService/GetModel", "NOT_FOUND"),
    ]


def test_a_stopping_server_leaves_no_record_open(server: Recorded) -> None:
    server.draw.hold()
    call = image_pb2_grpc.ImageServiceStub(server.channel).Generate(request(steps=3))
    next(call)
    server.stop(0)
    assert server.last().code == "UNAVAILABLE"
    server.draw.release()


def test_the_status_has_what_was_counted(server: Recorded) -> None:
    server.call(request(steps=2))
    server.draw.failure = EngineError("lost")
    server.call(request(steps=1))
    until(lambda: len(server.records.all) == 2)
    status = server.client.status()
    draw, talk = status.models
    counts = dict(draw.counts)
    assert counts.pop("run_seconds") > 0 and not talk.counts
    assert counts == {"requests": 2, "failed": 1, "steps": 2, "pictures": 1, "runs": 3, "calls": 3}
    assert status.uptime_seconds > 0 and status.memory_bytes > 1 << 20 and status.version and not status.stopping
