"""Progress over a WebSocket: previews, commands, tokens, pages elsewhere, hostile frames."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from runtime import limits
from serving.dialects.http import server as http
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer, until
from tests.fakes.web import serve
from tests.serving.dialects.a1111.conftest import Studio
from tests.serving.dialects.a1111.test_watching import PREVIEWS, Call, pixels

WATCH = "/sdapi/v1/ws/progress/"


def open_socket(port: int, id: str = "a", **headers: str) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{port}{WATCH}{id}", additional_headers=headers, open_timeout=10)


def news(socket: ClientConnection) -> Iterator[dict[str, Any]]:
    """The messages of a job until its end."""
    try:
        while True:
            yield json.loads(socket.recv(timeout=10))
    except ConnectionClosed:
        return


def closed(socket: ClientConnection) -> tuple[int, str]:
    """Why a socket was closed."""
    with pytest.raises(ConnectionClosed) as raised:
        while True:
            socket.recv(timeout=10)
    assert raised.value.rcvd is not None
    return raised.value.rcvd.code, raised.value.rcvd.reason


@proves("WebSocket /sdapi/v1/ws/progress/{id_task}")
def test_a_job_from_before_its_beginning_to_its_end(studio: Studio) -> None:
    fake = studio.fake
    fake.draw.hold()
    with open_socket(studio.server.port, "task(1)") as socket:
        messages = news(socket)
        first = next(messages)
        assert (first["id_task"], first["active"], first["completed"]) == ("task(1)", False, False)
        body = {"steps": 3, "force_task_id": "task(1)", **PREVIEWS}
        call = Call(studio.post, "/sdapi/v1/txt2img", body)
        until(lambda: fake.draw.calls == 1)
        fake.draw.let(1)
        step = next(message for message in messages if message["live_preview"])
        assert step["active"] and 0 < step["progress"] < 1 and step["id_live_preview"] == 0
        assert np.array_equal(pixels(step["live_preview"]), fake.draw.picture)
        fake.draw.release()
        *_, last = messages
        assert last["completed"] and last["progress"] == 1 and not last["interrupted"]
        assert socket.close_code == 1000
    assert call.end()[0] == 200


def test_commands(studio: Studio) -> None:
    fake = studio.fake
    fake.draw.hold()
    call = Call(studio.post, "/sdapi/v1/txt2img", {"steps": 2, "n_iter": 3, "seed": 1, "force_task_id": "a"})
    until(lambda: fake.draw.calls == 1)
    with open_socket(studio.server.port) as socket:
        socket.send('{"command": "skip"}')
        until(lambda: len(studio.requests) == 2)
        socket.send('{"command": "interrupt"}')
        *_, last = news(socket)
        assert last["completed"] and last["interrupted"]
    content = call.end()[1]
    assert content["images"] == [] and len(studio.requests) == 2


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        ("{", 1003, "message: is no command"),
        ('{"command": "stop"}', 1003, "message: is no command"),
        ('{"command": "interrupt", "id_task": "b"}', 1003, "message: is no command"),
        ("[" * 50_000, 1003, "message: is no command"),
        (b"\x00\xff", 1003, "message: is binary, expected text"),
        ("x" * (limits.MESSAGE.most + 1), 1009, ""),
    ],
)
def test_hostile_frames(studio: Studio, frame: str | bytes, code: int, reason: str) -> None:
    fake = studio.fake
    fake.draw.hold()
    call = Call(studio.post, "/sdapi/v1/txt2img", {"steps": 2, "force_task_id": "a"})
    until(lambda: fake.draw.calls == 1)
    with open_socket(studio.server.port) as socket:
        socket.send(frame)
        found = closed(socket)
        assert found[0] == code and found[1].startswith(reason)
    fake.draw.release()
    assert len(call.end()[1]["images"]) == 1 and fake.alive()


def test_frames_that_are_none(studio: Studio) -> None:
    """Reserved bits, a length that is no length, text that is no UTF-8."""
    fake = studio.fake
    fake.draw.hold()
    call = Call(studio.post, "/sdapi/v1/txt2img", {"steps": 2, "force_task_id": "a"})
    until(lambda: fake.draw.calls == 1)
    for frame in (
        b"\xf1\x80\x00\x00\x00\x00",
        b"\x81\xff" + b"\xff" * 8,
        b"\x81\x82\x00\x00\x00\x00\xff\xff",
        b"\x81\x01a",
    ):
        with open_socket(studio.server.port) as socket:
            socket.socket.sendall(frame)
            assert closed(socket)[0] in (1002, 1007, 1009)
    fake.draw.release()
    assert len(call.end()[1]["images"]) == 1 and fake.alive()


def test_a_job_that_never_begins(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ARRIVAL", SimpleNamespace(most=0.2))
    with open_socket(studio.server.port, "nothing") as socket:
        assert closed(socket) == (1008, "no job 'nothing' has begun: send it as force_task_id")
    with open_socket(studio.server.port, "x" * 65) as socket:
        assert closed(socket) == (1003, "id_task: has 65 characters, expected at most 64")


def test_pages_elsewhere(studio: Studio) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        open_socket(studio.server.port, Origin="https://elsewhere.example")
    own = {"Origin": f"http://127.0.0.1:{studio.server.port}"}
    with open_socket(studio.server.port, **own) as socket:
        assert json.loads(socket.recv(timeout=10))["textinfo"] == "Waiting..."


def test_a_silent_socket_stays(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections without requests are closed, and a WebSocket is none of them."""
    studio.fake.draw.hold()
    call = Call(studio.post, "/sdapi/v1/txt2img", {"steps": 2, "force_task_id": "a"})
    until(lambda: studio.fake.draw.calls == 1)
    monkeypatch.setattr(http.limits, "ARRIVAL", SimpleNamespace(most=1))
    with open_socket(studio.server.port) as socket:
        assert json.loads(socket.recv(timeout=10))["active"]
        with pytest.raises(TimeoutError):
            socket.recv(timeout=1.5)
        studio.fake.draw.release()
        assert list(news(socket))[-1]["completed"]
    call.end()


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    infer, metrics = (
        tokens.new(file, name, {scope}, None, None) for name, scope in (("a", Scope.INFER), ("b", Scope.METRICS))
    )
    with FakeServer(tmp_path / "bundles", ready=True) as fake:
        server = serve(fake, Security(gate=Gate(file)))
        for header in ({}, {"Authorization": f"Bearer {metrics}"}, {"Authorization": "Bearer x"}):
            with pytest.raises(InvalidStatus, match="403"):
                open_socket(server.port, **header)
        with open_socket(server.port, Authorization=f"Bearer {infer}") as socket:
            assert not json.loads(socket.recv(timeout=10))["active"]
        fake.do(server.stop())
