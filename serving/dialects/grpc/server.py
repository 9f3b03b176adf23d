"""The gRPC server of a `ModelHost`: enginecast.v1, the Open Inference Protocol, grpc.health.v1 and reflection. RPC
methods only translate and delegate.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NoReturn, Protocol

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime import limits
from runtime.errors import EnginecastError, Unavailable
from runtime.placing.heap import return_freed_memory
from serving.dialects.grpc import health
from serving.dialects.grpc.answering import answer
from serving.dialects.grpc.connection import server_credentials
from serving.dialects.grpc.intake import Intake
from serving.dialects.grpc.management import JobServicer, ModelServicer
from serving.dialects.grpc.recording import Recording
from serving.dialects.grpc.reflected import enable_reflection
from serving.dialects.grpc.task import GrpcTask, grpc_tasks
from serving.dialects.kserve.servicer import InferenceServicer
from serving.enginecast_pb import inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc, model_pb2, model_pb2_grpc
from serving.host.models import ModelHost
from serving.security.protection import OPEN, Security
from serving.security.tls import TlsFiles

log = logging.getLogger(__name__)

FAREWELL_SECONDS: Final = 0.3
"""Time for the last statuses to reach the clients once the models are unloaded."""
LEAVING_SECONDS: Final = 1.3
"""Seconds after the grace period until the process ends, even if threads still run."""
OPTIONS: Final = {
    "grpc.max_receive_message_length": limits.MESSAGE.most,
    "grpc.max_send_message_length": -1,
    "grpc.max_metadata_size": limits.METADATA.most,
    "grpc.max_concurrent_streams": limits.CONNECTION_CALLS.most,
    # A fixed flow-control window: the client keeps data that the server has not read yet.
    "grpc.http2.bdp_probe": 0,
    # On Linux two servers could otherwise listen on one port and share its clients.
    "grpc.so_reuseport": 0,
    # A machine that loses its power or network does not close its connections: ping idle ones, close silent ones.
    # For connections with data under way, gRPC waits ping_timeout for the answer, by default a minute.
    "grpc.keepalive_time_ms": 15_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.ping_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    # A connection that does not finish its handshake; by default gRPC waits two minutes.
    "grpc.server_handshake_timeout_ms": 1_000 * limits.ARRIVAL.most,
}


def service(host: ModelHost, task: GrpcTask) -> grpc.GenericRpcHandler[Any, Any]:
    """The gRPC service of a task."""
    (method,) = task.service.methods
    takes, gives = map(GetMessageClass, (method.input_type, method.output_type))
    handler = grpc.unary_stream_rpc_method_handler(
        partial(answer, host, task), takes.FromString, gives.SerializeToString
    )
    return grpc.method_handlers_generic_handler(task.service.full_name, {method.name: handler})


class Server:
    """A gRPC server of a host, listening on `address`. For port 0 the system chooses one; `port` is the result.

    `options` are gRPC options that override OPTIONS. Raises InvalidInput for an address that is malformed or may not be
    listened on with this `security`, Unavailable if it cannot be bound, and the errors of the files. Needs a running
    event loop.
    """

    def __init__(
        self,
        host: ModelHost,
        address: str,
        options: Mapping[str, int] | None = None,
        security: Security = OPEN,
    ) -> None:
        security.check(address)
        self.host = host
        self._intake = Intake(security.gate)
        self._server = grpc.aio.server(
            interceptors=[Recording(host.observer), self._intake],
            options=[*(OPTIONS | dict(options or {})).items()],
            maximum_concurrent_rpcs=limits.CALLS.most,
        )
        self._server.add_generic_rpc_handlers([service(host, task) for task in grpc_tasks().values()])
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(host), self._server)
        job_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(host), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(host), self._server)
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(host), self._server)
        files = model_pb2.DESCRIPTOR, job_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR
        others = [service for file in files for service in file.services_by_name.values()]
        enable_reflection([*(task.service for task in grpc_tasks().values()), *others], self._server)
        self.port = _bind(self._server, address, security.tls)

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def stop(self, grace: float | None = None) -> bool:
        """Refuse new requests, let running ones finish, stop the rest after `grace` seconds, unload the models.

        Returns False if a thread still loads or computes, see `ModelHost.close`.
        """
        free = await self.host.close(grace)
        await self._server.stop(FAREWELL_SECONDS)
        await self._intake.close()
        return free


class Beside(Protocol):
    """Another server of the same host, which starts and stops with that of gRPC."""

    async def start(self) -> str:
        """Accept requests. Returns a line that says where."""

    async def stop(self) -> None:
        """Close all connections. The host has been closed before."""


async def serve(
    host: ModelHost,
    address: str,
    announce: Callable[[str], None],
    security: Security = OPEN,
    beside: Sequence[Beside] = (),
) -> None:
    """Load the models that are to be loaded at the start, and serve until SIGINT or SIGTERM, then stop gracefully. A
    second signal ends the process at once.

    After the host's grace period the process ends with status 0, even if a thread still loads or computes.

    `announce` is called with a line when calls are accepted, before any model is loaded, and with one for each model
    when it is ready or fails. Servers `beside` this one start and stop with it. Raises the error of a model if all
    fail, and the errors of `Server`.
    """
    return_freed_memory(most_arenas=2)
    server = Server(host, address, security=security)
    stopped = asyncio.create_task(_stop_signal(host.limits.grace_seconds).wait())
    await server.start()
    lines = [await one.start() for one in beside]
    announce(f"listening on {address.rpartition(':')[0]}:{server.port}")
    for line in lines:
        announce(line)
    loaded = asyncio.gather(*(_load(host, name, announce) for name in host.at_start()))
    try:
        first: set[asyncio.Future[Any]] = {stopped, loaded}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if (
            loaded.done()
            and (reasons := [reason for reason in await loaded if reason])
            and len(reasons) == len(host.at_start())
            and not host.follows
        ):
            raise reasons[0]
        await stopped
    finally:
        log.info("stopping")
        loaded.cancel()
        free = await server.stop()
        await asyncio.gather(*(one.stop() for one in beside))
        if not free:
            _leave()


async def _load(host: ModelHost, name: str, announce: Callable[[str], None]) -> EnginecastError | None:
    """Load a model. Returns the error, None on success."""
    try:
        await host.load(name)
    except EnginecastError as error:
        # The cause still has the paths, which clients do not see.
        whole = error.__cause__ if isinstance(error.__cause__, EnginecastError) else error
        announce(f"{name} cannot be served: {whole}")
        return whole
    status = host.status(name)
    announce(f"{name} is ready on {status.target} ({status.device})")
    return None


def _stop_signal(grace: float) -> asyncio.Event:
    """An event that is set by the first SIGINT or SIGTERM. The process ends soon after `grace` seconds, or on the next
    signal.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        time.sleep(grace + LEAVING_SECONDS)
        log.warning("the grace period is over: threads that still load or compute are abandoned")
        _leave()

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        threading.Thread(target=end, daemon=True).start()
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def _leave() -> NoReturn:
    """End the process without waiting for its threads, as Python would. Their files are safe: they are renamed when
    complete.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _bind(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    try:
        return (
            server.add_insecure_port(address)
            if tls is None
            else server.add_secure_port(address, server_credentials(tls))
        )
    except RuntimeError:
        raise Unavailable(
            f"cannot listen on {address}: the port is in use, or the address is not one of this machine's. Choose "
            "another with --address"
        ) from None
