"""A server of real bundles, over gRPC and HTTP, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import enginecast
from runtime.bundle.manifest import Bundle
from runtime.placing.loading import load_model
from serving.dialects.grpc.server import Server
from serving.dialects.http.application import application
from serving.dialects.http.server import HttpServer
from serving.host.models import ModelHost
from serving.security.protection import OPEN
from serving.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """The addresses of a running server."""

    grpc: str
    http: str

    def client(self, model: str) -> enginecast.Client:
        """A gRPC client for a model."""
        return enginecast.Client(self.grpc, model)


@contextmanager
def serving(*folders: Path, target: str | None = None) -> Iterator[Samples]:
    """Serve bundles, each by its name, until the block ends; on the target that is named, or that each would use."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def do(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def start() -> tuple[ModelHost, Server, HttpServer]:
        host = ModelHost(map(Bundle, folders), load_model)
        grpc, http = (
            Server(host, "127.0.0.1:0"),
            HttpServer(application(host, Settings(), OPEN.gate), "127.0.0.1:0"),
        )
        await grpc.start()
        await http.start()
        for name in host.at_start():
            await host.load(name, target)
        return host, grpc, http

    _, grpc, http = do(start())
    try:
        yield Samples(f"127.0.0.1:{grpc.port}", f"http://127.0.0.1:{http.port}")
    finally:
        do(grpc.stop(0))
        do(http.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
