"""The gRPC server: enginecast.v1, grpc.health.v1 and reflection over a `ModelHost`. RPC methods only translate and delegate."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from runtime.errors import EnginecastError, InvalidInput, Unavailable
from serving import messages
from serving.enginecast_pb import chat_pb2, chat_pb2_grpc, image_pb2, image_pb2_grpc, model_pb2, model_pb2_grpc
from serving.host import ModelHost, State
from serving.status import reported

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_MESSAGE_BYTES: Final = 64 << 20
"""Largest message either way: a few pictures of 32 MiB's worth of camera, or a batch of large PNGs."""
STOP_SECONDS: Final = 2.0
"""Time for the last statuses to reach the clients once the models are unloaded."""
OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second server on the same port is not an error on Linux: the two would share the clients.
    ("grpc.so_reuseport", 0),
    # A client whose machine vanished sends no goodbye: ping idle connections and drop those that do not answer.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
IMAGE, CHAT, MODEL = (
    pb2.DESCRIPTOR.services_by_name[name].full_name
    for pb2, name in ((image_pb2, "ImageService"), (chat_pb2, "ChatService"), (model_pb2, "ModelService"))
)


class ImageServicer(image_pb2_grpc.ImageServiceServicer):
    def __init__(self, host: ModelHost) -> None:
        self.host = host

    async def Generate(self, request: image_pb2.GenerateRequest, context: Context) -> None:
        async with reported(context):
            wanted, stream = messages.image_request(request), messages.ImageStream()
            async with aclosing(self.host.run(request.model, "diffusion", wanted, context.time_remaining())) as events:
                async for event in events:
                    # PNGs are encoded off the event loop.
                    if (response := await asyncio.to_thread(stream.response, event)) is not None:
                        await context.write(response)


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    def __init__(self, host: ModelHost) -> None:
        self.host = host

    async def Chat(self, request: chat_pb2.ChatRequest, context: Context) -> None:
        async with reported(context):
            # Pictures are decoded off the event loop.
            wanted, stream = await asyncio.to_thread(messages.chat_request, request), messages.ChatStream()
            async with aclosing(self.host.run(request.model, "chat", wanted, context.time_remaining())) as events:
                async for event in events:
                    if (response := stream.response(event)) is not None:
                        await context.write(response)


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, host: ModelHost) -> None:
        self.host = host

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[messages.model(status) for status in self.host.statuses()])

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        async with reported(context):
            return model_pb2.GetModelResponse(model=messages.model(self.host.status(request.name)))

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Context) -> model_pb2.LoadModelResponse:
        async with reported(context):
            await self.host.load(request.name, request.target if request.HasField("target") else None)
            return model_pb2.LoadModelResponse(model=messages.model(self.host.status(request.name)))

    async def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Context) -> model_pb2.UnloadModelResponse:
        async with reported(context):
            await self.host.unload(request.name, messages.grace(request))
            return model_pb2.UnloadModelResponse(model=messages.model(self.host.status(request.name)))


def health_of(host: ModelHost) -> dict[str, bool]:
    """Whether each health service serves: every model by its name; the services of its kind; "" (the server) when any model is ready."""
    ready = [] if host.stopping else [status for status in host.statuses() if status.state is State.READY]
    kinds = {status.kind for status in ready}
    table = {"": bool(ready), IMAGE: "diffusion" in kinds, CHAT: "chat" in kinds, MODEL: not host.stopping}
    return table | {status.name: status in ready for status in host.statuses()}


class Server:
    """A listening gRPC server over a host. `port` is the one really bound, which matters when the address asks for port 0.

    Raises InvalidInput for a malformed address, Unavailable when it cannot be bound. Needs a running event loop.
    """

    def __init__(self, host: ModelHost, address: str) -> None:
        self.host = host
        self._server = grpc.aio.server(options=OPTIONS)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        image_pb2_grpc.add_ImageServiceServicer_to_server(ImageServicer(host), self._server)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(ChatServicer(host), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(host), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((IMAGE, CHAT, MODEL, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = _bind(self._server, address)

    async def start(self) -> None:
        """Accept calls."""
        await self._report_health()
        await self._server.start()
        self._watch = asyncio.create_task(self._watch_health())

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new requests, let running ones finish for `grace` seconds and stop the rest, unload the models, close the port."""
        await self.host.close(grace)
        await self._server.stop(STOP_SECONDS)
        self._watch.cancel()

    async def _watch_health(self) -> None:
        while True:
            await self.host.changed.wait()
            self.host.changed.clear()
            await self._report_health()

    async def _report_health(self) -> None:
        known = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        for service, serves in health_of(self.host).items():
            await self._health.set(service, known[0] if serves else known[1])


async def serve(host: ModelHost, address: str, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then stop gracefully; a second signal ends at once. Loads every model of the host.

    `announce` is given a line when calls are accepted, which is before the models are loaded, and one as each model is ready. Raises
    why a model cannot be loaded, or what `Server` raises.
    """
    server = Server(host, address)
    stopped = asyncio.create_task(_stop_signal().wait())
    await server.start()
    announce(f"listening on {address.rpartition(':')[0]}:{server.port}")
    loaded = asyncio.gather(*(_load(host, status.name, announce) for status in host.statuses()))
    try:
        first: set[asyncio.Future[Any]] = {stopped, loaded}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if loaded.done():
            await loaded
        await stopped
    finally:
        log.info("stopping")
        await server.stop()
        with suppress(EnginecastError, asyncio.CancelledError):
            await loaded


async def _load(host: ModelHost, name: str, announce: Callable[[str], None]) -> None:
    await host.load(name)
    status = host.status(name)
    announce(f"{name} is ready on {status.target} ({status.device})")


def _stop_signal() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets. The next one has its default effect."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def _bind(server: grpc.aio.Server, address: str) -> int:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput("address", f"'{address}' is none, expected HOST:PORT such as 127.0.0.1:50051 (port 0 takes any free one)")
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        raise Unavailable(
            f"cannot listen on {address}: the port is in use, or the address is not one of this machine's. Choose another with --address"
        ) from None
