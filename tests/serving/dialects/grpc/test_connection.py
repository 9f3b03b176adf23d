"""Requests that are sent again: after which waits, how often, and when not."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from PIL import Image

import enginecast
from runtime.errors import DeadlineExceeded, Unavailable
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.connection import Connection
from tests.fakes.serving import FakeServer, request


@pytest.fixture
def closed() -> Iterator[str]:
    """An address where nothing listens, and nothing else will."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def test_a_server_that_comes_back(warm: FakeServer) -> None:
    warm.client.unload("draw", 0)
    back = threading.Timer(0.3, lambda: warm.do(warm.host.load("draw")))
    back.start()
    with enginecast.Client(warm.address, "draw") as client:
        assert client.generate("a circle", steps=1).done.engines
    back.join()


def test_attempts_and_waits(warm: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is about twice the one before; gRPC varies them by a fifth."""
    times = []

    def pipeline(_: object) -> None:
        times.append(time.monotonic())
        raise Unavailable("not now")

    monkeypatch.setattr(warm.draw, "pipeline", pipeline)
    with (
        Client(warm.address, Connection(attempts=4, backoff=0.1)) as client,
        pytest.raises(Unavailable, match="not now"),
    ):
        list(client.generate(request()))
    first, second, third = (later - earlier for earlier, later in pairwise(times))
    assert first > 0.07 and second > 0.15 and third > 0.3 and first + second + third < 3
    times.clear()
    with Client(warm.address, Connection(attempts=1)) as client, pytest.raises(Unavailable):
        list(client.generate(request()))
    assert len(times) == 1


def test_no_attempt_outlives_the_deadline(closed: str) -> None:
    begun = time.monotonic()
    client = enginecast.Client(closed, timeout=0.4, attempts=5, backoff=10)
    with client, pytest.raises((Unavailable, DeadlineExceeded)):
        client.models()
    assert time.monotonic() - begun < 2


def test_large_requests_are_sent_again(warm: FakeServer) -> None:
    file = io.BytesIO()
    Image.new("RGB", (2000, 1500)).save(file, "PNG", compress_level=0)
    warm.client.unload("draw", 0)
    back = threading.Timer(0.2, lambda: warm.do(warm.host.load("draw")))
    back.start()
    assert list(warm.client.generate(request(image=file.getvalue(), steps=1)))[-1].HasField("done")
    back.join()


def test_a_request_that_has_an_answer_is_not_sent_again(warm: FakeServer) -> None:
    warm.draw.hold()
    responses = warm.client.generate(request(steps=9))
    assert next(responses).HasField("queued")
    warm.draw.failure = Unavailable("gone")
    warm.draw.release()
    with pytest.raises(Unavailable, match="gone"):
        list(responses)
    assert warm.draw.calls == 1


def test_a_token_is_not_shown() -> None:
    assert "ec_secret" not in repr(Connection(token="ec_secret"))
