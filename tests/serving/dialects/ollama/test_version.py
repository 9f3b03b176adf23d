"""What clients of Ollama ask first: whether the server is there, and its version."""

from __future__ import annotations

import http.client
from importlib.metadata import version
from pathlib import Path

from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer
from tests.fakes.web import send, serve


@proves("GET /")
@proves("HEAD /")
@proves("GET /api/version")
def test_the_server_is_there(tmp_path: Path) -> None:
    with FakeServer(tmp_path / "bundles") as fake:
        server = serve(fake)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        for verb, text in (("GET", b"enginecast is running"), ("HEAD", b"")):
            connection.request(verb, "/")
            response = connection.getresponse()
            assert response.status == 200 and response.read() == text
        connection.close()
        assert send(server, "/api/version", verb="GET")[1] == {"version": version("enginecast")}
        fake.do(server.stop())
