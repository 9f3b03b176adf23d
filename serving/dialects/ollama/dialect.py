"""What clients of Ollama use: paths under /api and the root (https://github.com/ollama/ollama, docs/api.md)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from fastapi import APIRouter
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, Response

from runtime.errors import EnginecastError
from serving.dialects.http.dialect import Dialect
from serving.dialects.http.errors import message_of
from serving.dialects.http.pages import Receive, Send
from serving.dialects.http.route import Route
from serving.dialects.ollama import conversation, embed, fields, listing, storing
from serving.dialects.ollama import generate as generating
from serving.dialects.ollama.replies import Fields
from serving.dialects.ollama.stores import Stores
from serving.host.models import ModelHost
from serving.settings import Settings


class JsonRoute(Route):
    """A route whose body is JSON, whatever its header says: `curl --data` says that it is a form."""

    async def handle(self, scope: Any, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": list(scope["headers"])}
        MutableHeaders(scope=scope)["content-type"] = "application/json"
        await super().handle(scope, receive, send)


def router(host: ModelHost, settings: Settings) -> APIRouter:
    """The endpoints for a host."""
    routes = APIRouter(route_class=JsonRoute)
    _reading(routes, host)
    _inferring(routes, host)
    _changing(routes, storing.Storing(host, Stores(host, settings)))
    return routes


def _reading(routes: APIRouter, host: ModelHost) -> None:
    @routes.head("/")
    @routes.get("/")
    async def root() -> PlainTextResponse:
        return PlainTextResponse("enginecast is running")

    @routes.get("/api/version")
    async def which() -> dict[str, str]:
        return {"version": version("enginecast")}

    @routes.get("/api/tags")
    async def tags() -> Fields:
        return listing.tags(host)

    @routes.get("/api/ps")
    async def ps() -> Fields:
        return listing.ps(host)

    @routes.post("/api/show")
    async def show(body: fields.Show) -> Fields:
        return listing.show(host, body)


def _inferring(routes: APIRouter, host: ModelHost) -> None:
    @routes.post("/api/generate")
    async def generate(body: fields.Generate) -> Response:
        return await generating.generate(host, body)

    @routes.post("/api/chat")
    async def chat(body: fields.Chat) -> Response:
        return await conversation.chat(host, body)

    @routes.post("/api/embed")
    async def vectors(body: fields.Embed) -> Fields:
        return await embed.embed(host, body)

    @routes.post("/api/embeddings")
    async def vector(body: fields.Embedding) -> Fields:
        return await embed.embeddings(host, body)


def _changing(routes: APIRouter, store: storing.Storing) -> None:
    @routes.post("/api/pull")
    async def pull(body: fields.Pull) -> Response:
        return await store.pull(body)

    @routes.post("/api/push")
    async def push(body: fields.Push) -> Response:
        return await store.push(body)

    @routes.post("/api/copy")
    async def copy(body: fields.Copy) -> Response:
        return await store.copy(body)

    @routes.delete("/api/delete")
    async def delete(body: fields.Name) -> Response:
        return await store.delete(body)

    @routes.post("/api/create")
    async def create(body: fields.Create) -> Response:
        return await store.create(body)


def body(error: EnginecastError, status: int) -> Mapping[str, Any]:
    """The JSON of an error."""
    return {"error": message_of(error)}


DIALECT: Final = Dialect("ollama", ("/api/",), router, body)
