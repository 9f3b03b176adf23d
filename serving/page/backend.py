"""Where a page's requests go: the models of this process, or those of a server elsewhere."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.errors import EnginecastError
from runtime.files import key_of
from runtime.pipeline import Event
from runtime.task import Request
from serving.dialects.grpc import messages
from serving.dialects.grpc.status import note
from serving.dialects.grpc.task import MODEL, grpc_tasks
from serving.dialects.python.client import Client
from serving.enginecast_pb import model_pb2
from serving.host.models import ModelHost
from serving.host.observing import Record, recorded
from serving.security.gate import Gate

Models = list[model_pb2.Model]
Scripts = list[model_pb2.ScriptInfo]


@dataclass(frozen=True)
class Visitor:
    """Who has a page open. `session` is what Gradio names the page by, a number that only the page knows; where the
    server needs tokens, `authorization` is that of who logged in, as "Bearer TOKEN".
    """

    session: str
    authorization: str = ""


class Backend(ABC):
    """The models that a page offers its visitors. Every method raises the errors of `runtime.errors`."""

    @abstractmethod
    async def models(self, visitor: Visitor) -> Models:
        """Every model, sorted by name."""

    @abstractmethod
    async def scripts(self, visitor: Visitor) -> Scripts:
        """Every script that requests may name, sorted by name."""

    @abstractmethod
    def identity(self, model: str) -> str:
        """What tells a model from others, in names of files that are kept."""

    @abstractmethod
    def run(self, model: str, request: Request, visitor: Visitor) -> AsyncGenerator[Event, None]:
        """The events of a request. Closing the generator stops the work."""

    @abstractmethod
    async def stop(self, id: str) -> None:
        """Stop a request by the id of its `Queued`. Raises NotFound when it has ended."""

    @abstractmethod
    async def load(self, model: str, visitor: Visitor) -> None:
        """Load a model and wait until it is ready."""

    @abstractmethod
    async def unload(self, model: str, visitor: Visitor) -> None:
        """Let the requests of a model finish, and free its engines."""

    def check(self, task: str, visitor: Visitor) -> None:
        """Raise the error of a visitor who may not run requests of a task."""

    async def close(self) -> None:
        """Free what belongs to the page alone."""


class Local(Backend):
    """The models of a host in this process, for those that its `gate` admits. Used on its event loop. What a visitor
    does is admitted as the call of gRPC that does it; looking at models, as an open page does all the time, does not
    count for the limits of a token.
    """

    def __init__(self, host: ModelHost, gate: Gate | None = None) -> None:
        self._host, self._gate = host, gate or Gate()

    async def models(self, visitor: Visitor) -> Models:
        self._gate.known(visitor.authorization)
        return [messages.model(status) for status in self._host.statuses()]

    async def scripts(self, visitor: Visitor) -> Scripts:
        self._gate.known(visitor.authorization)
        return [messages.script_info(one) for one in await asyncio.to_thread(self._host.scripts.listed)]

    def identity(self, model: str) -> str:
        served = self._host.catalog.find(model)
        bundle = served.offer.bundle
        return key_of(served.name, "" if bundle is None else bundle.content.hex())

    async def run(self, model: str, request: Request, visitor: Visitor) -> AsyncGenerator[Event, None]:
        record = Record(method=_method(request.task), client=f"page:{visitor.session}")
        with self._gate.admitted(record, visitor.authorization):
            async with aclosing(self._host.run(model, request, client=record.client)) as events:
                async for event in events:
                    yield event

    def check(self, task: str, visitor: Visitor) -> None:
        self._gate.allows(_method(task), visitor.authorization)

    async def stop(self, id: str) -> None:
        self._host.stop(id)

    async def load(self, model: str, visitor: Visitor) -> None:
        with self._managing("LoadModel", model, visitor):
            await self._host.load(model)

    async def unload(self, model: str, visitor: Visitor) -> None:
        with self._managing("UnloadModel", model, visitor):
            await self._host.unload(model)

    @contextmanager
    def _managing(self, method: str, model: str, visitor: Visitor) -> Iterator[None]:
        """Admit a management call, which is in the audit log."""
        asked = json.dumps({"name": model}, ensure_ascii=False)
        record = Record(method=f"{MODEL}/{method}", client=f"page:{visitor.session}", request=asked)
        with recorded(record, self._host.observer):
            try:
                with self._gate.admitted(record, visitor.authorization):
                    yield
            except EnginecastError as error:
                note(record, error)
                raise


def _method(task: str) -> str:
    """The full name of the call of gRPC that does a task."""
    method = grpc_tasks()[task].method
    return f"{method.containing_service.full_name}/{method.name}"


class Remote(Backend):
    """The models of a server at "host:port", for everyone who has the page. `connection` are the options of `Client`:
    token, TLS and others.
    """

    def __init__(self, address: str, **connection: Any) -> None:
        self._connect = partial(Client, address, **connection)
        self._any = self._connect()
        self._clients: dict[str, Client] = {}

    def _of(self, model: str) -> Client:
        if model not in self._clients:
            self._clients[model] = self._connect(model=model)
        return self._clients[model]

    async def models(self, visitor: Visitor) -> Models:
        return await asyncio.to_thread(self._any.models)

    async def scripts(self, visitor: Visitor) -> Scripts:
        return await asyncio.to_thread(self._any.installed_scripts)

    def identity(self, model: str) -> str:
        return self._of(model).identity

    async def run(self, model: str, request: Request, visitor: Visitor) -> AsyncGenerator[Event, None]:
        async with aclosing(self._of(model).run(request, list)) as stream:
            async for event in stream:
                yield event

    async def stop(self, id: str) -> None:
        await asyncio.to_thread(self._any.stop, id)

    async def load(self, model: str, visitor: Visitor) -> None:
        await asyncio.to_thread(self._of(model).load)

    async def unload(self, model: str, visitor: Visitor) -> None:
        await asyncio.to_thread(self._of(model).unload)

    async def close(self) -> None:
        for client in (self._any, *self._clients.values()):
            client.close()
