"""What surrounds every call of a dialect: records, tokens, errors, sizes, clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.responses import StreamingResponse

from runtime import limits
from runtime.errors import NotFound, Unavailable
from serving.dialects.http import application as made
from serving.dialects.http import dialect as declared
from serving.dialects.http.dialect import Dialect, dialect_of, dialects
from serving.dialects.http.errors import message_of
from serving.dialects.http.route import Route
from serving.host.models import ModelHost
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from serving.settings import Settings
from tests.fakes.serving import Ended, FakeServer, until
from tests.fakes.web import send, serve


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    count: int = 1


STATE: dict[str, Any] = {}


def router(host: ModelHost, settings: Settings) -> APIRouter:
    routes = APIRouter(route_class=Route)

    @routes.post("/toy/things/{kind}")
    async def things(kind: str, thing: Thing) -> dict[str, Any]:
        if kind == "lost":
            raise NotFound("there is no such thing")
        if kind == "busy":
            error = Unavailable("come back")
            error.retry_seconds = 1.2
            raise error
        if kind == "broken":
            raise RuntimeError("secret")
        if kind == "slow":
            STATE["began"] = True
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                STATE["stopped"] = True
                raise
        return {"kind": kind, "count": thing.count}

    @routes.get("/toy/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            try:
                for number in range(10_000):
                    yield f"{number}\n"
                    await asyncio.sleep(0.01)
            finally:
                STATE["closed"] = True

        return StreamingResponse(lines())

    return routes


TOY = Dialect("toy", ("/toy/",), router, lambda error, status: {"why": message_of(error), "status": status})


@pytest.fixture
def ended() -> Ended:
    STATE.clear()
    return Ended("toy/")


@pytest.fixture
def fake(tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    for module in (made, declared):
        monkeypatch.setattr(module, "dialects", lambda: (*dialects(), TOY))
    with FakeServer(tmp_path / "bundles", ready=True, observers=[ended]) as server:
        yield server


@pytest.mark.parametrize(
    "path, body, status, why",
    [
        ("/toy/things/good", {"name": "x", "count": 3}, 200, None),
        ("/toy/things/lost", {"name": "x"}, 404, "there is no such thing"),
        ("/toy/things/busy", {"name": "x"}, 503, "come back"),
        ("/toy/things/broken", {"name": "x"}, 500, "the server failed unexpectedly: its log says why"),
        ("/toy/things/good", {}, 400, "name: is missing, and is required"),
        ("/toy/things/good", {"name": "x", "size": 1}, 400, "size: is not known here: leave it out"),
        ("/toy/things/good", {"name": "x", "count": "y"}, 400, "count: input should be a valid integer"),
        ("/toy/things/good", b"{", 400, "body: is no JSON text"),
        ("/toy/things/good", b"[" * 100_000, 400, "body: "),
        ("/toy/things", {"name": "x"}, 404, "there is nothing at /toy/things"),
    ],
)
def test_errors_in_the_words_of_the_dialect(
    fake: FakeServer, ended: Ended, path: str, body: Any, status: int, why: str | None
) -> None:
    server = serve(fake)
    response, content = send(server, path, body, x_request_id="mine")
    assert response.status == status
    if why is None:
        assert content == {"kind": "good", "count": 3}
    else:
        assert content["status"] == status and content["why"].startswith(why)
    if path != "/toy/things":
        until(lambda: bool(ended.records))
        (record,) = ended.records
        assert (record.method, record.id) == ("toy/POST /toy/things/{kind}", "mine")
        assert (record.code == "OK") == (status == 200) and response.headers["x-request-id"] == "mine"
    assert (response.headers.get("retry-after") == "2") == ("busy" in path)
    fake.do(server.stop())


def test_another_verb(fake: FakeServer) -> None:
    server = serve(fake)
    response, content = send(server, "/toy/things/good", verb="DELETE")
    assert response.status == 405 and content["why"].startswith("method: DELETE is not one of")
    fake.do(server.stop())


def test_a_body_that_is_too_large(fake: FakeServer) -> None:
    server = serve(fake)
    response, content = send(server, "/toy/things/good", {"name": "x" * (limits.MESSAGE.most + 1)})
    assert response.status == 400 and "has more than 20,971,520 bytes" in content["why"]
    fake.do(server.stop())


def test_tokens(fake: FakeServer, ended: Ended, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    reader, manager = (
        tokens.new(file, name, {scope}, None, None) for name, scope in (("a", Scope.INFER), ("b", Scope.MANAGE))
    )
    server = serve(fake, Security(gate=Gate(file)))
    thing = {"name": "x"}
    response, content = send(server, "/toy/things/good", thing)
    assert response.status == 401 and "token is required" in content["why"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert send(server, "/toy/things/good", thing, authorization=f"Bearer {reader}")[0].status == 403
    assert send(server, "/toy/things/good", thing, authorization=f"Bearer {manager}")[0].status == 200
    until(lambda: len(ended.records) == 3)
    assert [(record.client, record.code) for record in ended.records[1:]] == [("a", "PERMISSION_DENIED"), ("b", "OK")]
    fake.do(server.stop())


@pytest.mark.parametrize("path, mark", [("/toy/things/slow", "stopped"), ("/toy/stream", "closed")])
def test_a_client_that_leaves(fake: FakeServer, ended: Ended, path: str, mark: str) -> None:
    server = serve(fake)
    verb = "POST" if mark == "stopped" else "GET"
    body = b'{"name": "x"}' if mark == "stopped" else b""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"{verb} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if mark == "closed":
            assert connection.recv(100)
        else:
            until(lambda: "began" in STATE)
    until(lambda: STATE.get(mark, False) and bool(ended.records))
    assert ended.records[0].code == "CANCELLED"
    fake.do(server.stop())


def test_pages_elsewhere_get_the_words_of_the_dialect(fake: FakeServer) -> None:
    server = serve(fake)
    response, content = send(server, "/toy/things/good", {"name": "x"}, origin="https://elsewhere.example")
    assert response.status == 403 and content["why"].startswith("pages of 'https://elsewhere.example' may not call")
    own = f"http://127.0.0.1:{server.port}"
    assert send(server, "/toy/things/good", {"name": "x"}, origin=own)[0].status == 200
    fake.do(server.stop())


def test_paths_belong_to_one_dialect() -> None:
    prefixes = [prefix for dialect in dialects() for prefix in dialect.prefixes]
    assert len(prefixes) == len(set(prefixes))
    found = dialect_of("/api/chat")
    assert found is not None and found.name == "ollama"


def test_the_root(fake: FakeServer) -> None:
    server = serve(fake)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("HEAD", "/")
    assert connection.getresponse().status == 200
    connection.close()
    fake.do(server.stop())
