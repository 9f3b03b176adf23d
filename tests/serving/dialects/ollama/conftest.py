"""A fake server that clients of Ollama call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from ollama import Client

from serving.dialects.http.server import HttpServer
from tests.fakes.serving import FakeServer, note_requests
from tests.fakes.web import send, serve

STREAMING: Final = ("/api/chat", "/api/generate")


@dataclass
class Served:
    """The fake server, its address over HTTP, Ollama's own client, and the requests that its models got."""

    fake: FakeServer
    server: HttpServer
    client: Client
    requests: list[Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON of a response, which is no stream."""
        whole = {"stream": False} if path in STREAMING and "stream" not in body else {}
        response, content = send(self.server, path, {**whole, **body})
        return response.status, content


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "bundles") as found:
        yield found


@pytest.fixture
def served(lasting: Served) -> Served:
    """A server that the tests of a file share; it has got no requests yet."""
    lasting.requests.clear()
    return lasting


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Served]:
    """A server of the test's own."""
    with serving(tmp_path / "bundles") as found:
        yield found


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server of fake models, whose bundles are put into a new folder."""
    with FakeServer(folder) as fake:
        requests: list[Any] = []
        for model in fake.models.values():
            note_requests(model, requests)
        server = serve(fake)
        with Client(f"http://127.0.0.1:{server.port}") as client:
            yield Served(fake, server, client, requests)
        fake.do(server.stop())
