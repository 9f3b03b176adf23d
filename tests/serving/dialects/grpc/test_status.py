"""What statuses say to programs: google.rpc details, within the size that trailers may have."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runtime.errors import BundleError, Cancelled, InvalidInput, ResourceExhausted, Unavailable
from serving.dialects.grpc import status as statuses
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.status import Sending, details
from serving.enginecast_pb import image_pb2_grpc
from tests.fakes.serving import FakeServer, request, until


def refused(server: FakeServer, **fields: Any) -> tuple[grpc.RpcError, dict[type, Any]]:
    """The error of a request, and its details by their class, as any client reads them."""
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(image_pb2_grpc.ImageServiceStub(channel).Generate(request(**fields)))
    status = rpc_status.from_call(caught.value)
    assert status is not None, "code and message agree with the call's own"
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found: dict[type, Any] = {}
    for detail in status.details:
        (kind,) = (kind for kind in kinds if detail.Is(kind.DESCRIPTOR))
        found[kind] = kind()
        detail.Unpack(found[kind])
    return caught.value, found


def test_an_invalid_field(warm: FakeServer) -> None:
    error, found = refused(warm, steps=0)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    info = found[error_details_pb2.ErrorInfo]
    assert (info.reason, info.domain) == ("InvalidInput", "enginecast")
    (violation,) = found[error_details_pb2.BadRequest].field_violations
    assert violation.field == "steps" and violation.description.startswith("is 0")
    assert error_details_pb2.RetryInfo not in found
    assert dict(error.trailing_metadata())["enginecast-field"] == "steps"


def test_the_time_to_wait(warm: FakeServer) -> None:
    warm.client.unload("draw", 0)
    error, found = refused(warm)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert found[error_details_pb2.RetryInfo].retry_delay.ToTimedelta().total_seconds() == 1
    with Client(warm.address, Connection(attempts=1)) as client, pytest.raises(Unavailable) as caught:
        list(client.generate(request()))
    assert caught.value.retry_seconds == 1


def test_a_full_queue(warm: FakeServer) -> None:
    warm.draw.hold()
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(list, warm.client.generate(request(steps=1))) for _ in range(3)]
        until(lambda: warm.busy() == 3)
        error, found = refused(warm)
        warm.draw.release()
        assert all(one.result()[-1].HasField("done") for one in running)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert found[error_details_pb2.RetryInfo].retry_delay.ToSeconds() == 1


@pytest.mark.parametrize("letter", ["x", "ü", "漢", "%", "🦊"])
def test_the_longest_texts_arrive(warm: FakeServer, letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = InvalidInput(letter * 1000, letter * 5000)
    monkeypatch.setattr(warm.draw, "pipeline", lambda request: (_ for _ in ()).throw(failure))
    error, found = refused(warm)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and error.details().startswith(letter)
    (violation,) = found[error_details_pb2.BadRequest].field_violations
    assert violation.field.startswith(letter * 100) and violation.description.startswith(letter * 100)
    sizes = [len(key) + len(value) + 32 for key, value in error.trailing_metadata()]
    assert sum(sizes) + len(quote(error.details())) < 8192 - 512, "gRPC drops longer trailers at random"
    with pytest.raises(InvalidInput) as caught:
        list(warm.client.generate(request()))
    assert caught.value.field.startswith(letter * 100), "without percent signs"


def test_the_reason_arrives(warm: FakeServer) -> None:
    with pytest.raises(InvalidInput) as caught:
        list(warm.client.generate(request(steps=0)))
    assert str(caught.value) == f"steps: {caught.value.reason}" and caught.value.reason.startswith("is 0")


def test_no_path_is_in_any_part_of_a_status(cold: FakeServer, tmp_path: Path) -> None:
    hidden = tmp_path / "draw" / "secret"
    cold.load_failure = BundleError(f"{hidden} and /etc/passwd are damaged")
    error, _ = refused(cold)
    sent = " ".join([error.details(), *(str(value) for _, value in error.trailing_metadata())])
    assert "are damaged" in sent and "secret" not in sent.replace("draw/secret", "") and "/etc" not in sent
    assert str(tmp_path) not in sent


def test_details() -> None:
    def kinds(error: Any) -> list[str]:
        return [type(one).__name__ for one in details(error)]

    assert kinds(ResourceExhausted("full")) == ["ErrorInfo"]
    assert kinds(ResourceExhausted("full", 2.5)) == ["ErrorInfo", "RetryInfo"]
    assert details(ResourceExhausted("full", 2.5))[1].retry_delay.ToMilliseconds() == 2500  # type: ignore[attr-defined]


class Reader:
    """A client that takes some time to read each response."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def write(self, response: Any) -> None:
        await asyncio.sleep(self.seconds)


class TestSending:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(statuses, "UNREAD_SECONDS", 0.1)

    async def test_a_long_answer_may_take_longer_than_one_response(self) -> None:
        context: Any = Reader(0.03)
        with Sending(context) as write:
            for _ in range(6):
                await write(None)
            await asyncio.sleep(0.15)  # the model may take its time as well
            await write(None)

    async def test_a_client_that_does_not_read(self) -> None:
        context: Any = Reader(10)
        began = asyncio.get_running_loop().time()
        with pytest.raises(Cancelled, match=r"read nothing for 0\.1 s"), Sending(context) as write:
            await asyncio.sleep(0.06)
            await write(None)
        assert 0.16 <= asyncio.get_running_loop().time() - began < 0.5
        task = asyncio.current_task()
        assert task is not None and not task.cancelling(), "the task goes on"

    async def test_a_call_that_was_cancelled(self) -> None:
        context: Any = Reader(10)

        async def answer() -> None:
            with Sending(context) as write:
                await write(None)

        call = asyncio.create_task(answer())
        await asyncio.sleep(0.02)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
