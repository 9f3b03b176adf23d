"""Where a page's requests go: the models of this process, or those of a server elsewhere."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from runtime.files import key_of
from runtime.pipeline import Event
from runtime.task import Request
from serving.dialects.grpc import messages
from serving.dialects.python.client import Client
from serving.enginecast_pb import model_pb2
from serving.host.models import ModelHost

Models = list[model_pb2.Model]
Scripts = list[model_pb2.ScriptInfo]


class Backend(ABC):
    """The models that a page offers. Every method raises the errors of `runtime.errors`."""

    @abstractmethod
    async def models(self) -> Models:
        """Every model, sorted by name."""

    @abstractmethod
    async def scripts(self) -> Scripts:
        """Every script that requests may name, sorted by name."""

    @abstractmethod
    def identity(self, model: str) -> str:
        """What tells a model from others, in names of files that are kept."""

    @abstractmethod
    def run(self, model: str, request: Request, client: str) -> AsyncGenerator[Event, None]:
        """The events of a request of a client, who is an open page. Closing the generator stops the work."""

    @abstractmethod
    async def stop(self, id: str) -> None:
        """Stop a request by the id of its `Queued`. Raises NotFound when it has ended."""

    @abstractmethod
    async def load(self, model: str) -> None:
        """Load a model and wait until it is ready."""

    @abstractmethod
    async def unload(self, model: str) -> None:
        """Let the requests of a model finish, and free its engines."""

    async def close(self) -> None:
        """Free what belongs to the page alone."""


class Local(Backend):
    """The models of a host in this process. Used on its event loop."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    async def models(self) -> Models:
        return [messages.model(status) for status in self._host.statuses()]

    async def scripts(self) -> Scripts:
        return [messages.script_info(one) for one in await asyncio.to_thread(self._host.scripts.listed)]

    def identity(self, model: str) -> str:
        served = self._host.catalog.find(model)
        bundle = served.offer.bundle
        return key_of(served.name, "" if bundle is None else bundle.content.hex())

    def run(self, model: str, request: Request, client: str) -> AsyncGenerator[Event, None]:
        return self._host.run(model, request, client=client)

    async def stop(self, id: str) -> None:
        self._host.stop(id)

    async def load(self, model: str) -> None:
        await self._host.load(model)

    async def unload(self, model: str) -> None:
        await self._host.unload(model)


class Remote(Backend):
    """The models of a server at "host:port". `connection` are the options of `Client`: token, TLS and others."""

    def __init__(self, address: str, **connection: Any) -> None:
        self._connect = partial(Client, address, **connection)
        self._any = self._connect()
        self._clients: dict[str, Client] = {}

    def _of(self, model: str) -> Client:
        if model not in self._clients:
            self._clients[model] = self._connect(model=model)
        return self._clients[model]

    async def models(self) -> Models:
        return await asyncio.to_thread(self._any.models)

    async def scripts(self) -> Scripts:
        return await asyncio.to_thread(self._any.installed_scripts)

    def identity(self, model: str) -> str:
        return self._of(model).identity

    async def run(self, model: str, request: Request, client: str) -> AsyncGenerator[Event, None]:
        async with aclosing(self._of(model).run(request, list)) as stream:
            async for event in stream:
                yield event

    async def stop(self, id: str) -> None:
        await asyncio.to_thread(self._any.stop, id)

    async def load(self, model: str) -> None:
        await asyncio.to_thread(self._of(model).load)

    async def unload(self, model: str) -> None:
        await asyncio.to_thread(self._of(model).unload)

    async def close(self) -> None:
        for client in (self._any, *self._clients.values()):
            client.close()
