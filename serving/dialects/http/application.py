"""Everything that a server offers over HTTP, as one ASGI application: the dialects, gRPC-Web and Connect."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from serving.dialects.connect.application import Application as Connect
from serving.dialects.http import errors
from serving.dialects.http.dialect import dialects
from serving.dialects.http.pages import App, Receive, Send
from serving.host.models import ModelHost
from serving.security.gate import Gate
from serving.settings import Settings


def application(host: ModelHost, settings: Settings, gate: Gate) -> App:
    """The application of a host, for the clients that the gate admits."""
    connect, others = Connect(host, gate), dialect_application(host, settings, gate)
    paths = frozenset(connect.paths)

    async def dispatch(scope: Any, receive: Receive, send: Send) -> None:
        await (connect if scope.get("path") in paths else others)(scope, receive, send)

    return dispatch


def dialect_application(host: ModelHost, settings: Settings, gate: Gate) -> FastAPI:
    """The dialects alone. /openapi.json describes them."""
    app = FastAPI(
        title="enginecast",
        version=version("enginecast"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers=errors.HANDLERS,
        responses={"default": {"description": "An error, in the words of the dialect."}},
    )
    app.state.observer, app.state.gate = host.observer, gate
    for dialect in dialects():
        app.include_router(dialect.router(host, settings))
    return app
