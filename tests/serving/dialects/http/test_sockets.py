"""WebSockets of dialects: their records, and how errors end them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from runtime.errors import NotFound
from serving.dialects.http import application as made
from serving.dialects.http import dialect as declared
from serving.dialects.http.dialect import Dialect, dialects
from serving.dialects.http.sockets import admitted
from serving.host.models import ModelHost
from serving.settings import Settings
from tests.fakes.serving import Ended, FakeServer, until
from tests.fakes.web import serve


def router(host: ModelHost, settings: Settings) -> APIRouter:
    routes = APIRouter()

    @routes.websocket("/toy/ws/{kind}")
    async def talk(socket: WebSocket, kind: str) -> None:
        async with admitted(socket) as messages:
            if kind == "lost":
                raise NotFound("there is no such thing")
            if kind == "broken":
                raise RuntimeError("secret")
            async for text in messages:
                if text == "end":
                    break
                await messages.send({"echo": text})
            else:
                await asyncio.sleep(0)
                await messages.send({"too": "late"})

    return routes


TOY = Dialect("toy", ("/toy/",), router, lambda error, status: {})


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    for module in (made, declared):
        monkeypatch.setattr(module, "dialects", lambda: (*dialects(), TOY))
    return Ended("toy/")


@pytest.fixture
def port(tmp_path: Path, ended: Ended) -> Iterator[int]:
    with FakeServer(tmp_path / "bundles", observers=[ended]) as fake:
        server = serve(fake)
        yield server.port
        fake.do(server.stop())


def test_records_and_errors(port: int, ended: Ended) -> None:
    with connect(f"ws://127.0.0.1:{port}/toy/ws/good", additional_headers={"x-request-id": "mine"}) as socket:
        socket.send("a")
        assert socket.recv(timeout=10) == '{"echo": "a"}'
        socket.send("end")
        assert closed(socket) == (1000, "")
    assert closed(connect(f"ws://127.0.0.1:{port}/toy/ws/lost")) == (1008, "there is no such thing")
    code, reason = closed(connect(f"ws://127.0.0.1:{port}/toy/ws/broken"))
    assert code == 1011 and "secret" not in reason
    with connect(f"ws://127.0.0.1:{port}/toy/ws/good"):
        pass  # it leaves
    until(lambda: len(ended.records) == 4)
    assert {record.method for record in ended.records} == {"toy/WS /toy/ws/{kind}"} and ended.records[0].id == "mine"
    assert [record.code for record in ended.records] == ["OK", "NOT_FOUND", "INTERNAL", "CANCELLED"]


def closed(socket: Any) -> tuple[int, str]:
    with socket, pytest.raises(ConnectionClosed) as raised:
        socket.recv(timeout=10)
    assert raised.value.rcvd is not None
    return raised.value.rcvd.code, raised.value.rcvd.reason
