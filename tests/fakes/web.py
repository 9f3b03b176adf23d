"""The HTTP server of a fake server, and requests to it without a client library."""

from __future__ import annotations

import http.client
import json
from typing import Any

from enginecast.testing.server import FakeServer
from serving.dialects.http.application import application
from serving.dialects.http.server import HttpServer
from serving.security.protection import Security
from serving.settings import Settings


def serve(fake: FakeServer, security: Security | None = None, settings: Settings | None = None) -> HttpServer:
    """An HTTP server of the models of a fake server. `fake.do(server.stop())` stops it."""

    async def start() -> HttpServer:
        guarded = security or Security()
        app = application(fake.host, settings or Settings(), guarded.gate)
        server = HttpServer(app, "127.0.0.1:0", security=guarded)
        await server.start()
        return server

    return fake.do(start())


def send(server: HttpServer, path: str, body: Any = None, verb: str = "POST", **headers: str) -> tuple[Any, Any]:
    """A response, and the JSON of its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(verb, path, data, sent)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response, json.loads(text) if text else None
