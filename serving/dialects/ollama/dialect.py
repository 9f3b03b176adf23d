"""What clients of Ollama use: paths under /api and the root (https://github.com/ollama/ollama, docs/api.md)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import PlainTextResponse

from runtime.errors import EnginecastError
from serving.dialects.http.dialect import Dialect
from serving.dialects.http.errors import message_of
from serving.dialects.http.route import Route
from serving.host.models import ModelHost
from serving.settings import Settings


def router(host: ModelHost, settings: Settings) -> APIRouter:
    """The endpoints for a host."""
    routes = APIRouter(route_class=Route)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def root() -> PlainTextResponse:
        return PlainTextResponse("enginecast is running")

    @routes.get("/api/version")
    async def which() -> dict[str, str]:
        return {"version": version("enginecast")}

    return routes


def body(error: EnginecastError, status: int) -> Mapping[str, Any]:
    """The JSON of an error."""
    return {"error": message_of(error)}


DIALECT: Final = Dialect("ollama", ("/api/",), router, body)
