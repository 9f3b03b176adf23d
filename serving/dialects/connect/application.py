"""The services of enginecast.v1 over HTTP, as an ASGI application: gRPC-Web, and Connect with JSON or protobuf."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final

from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from runtime import limits
from serving.dialects.connect.calls import Calls, Context
from serving.dialects.connect.codecs import CODECS, GZIP
from serving.dialects.grpc.answering import responses
from serving.dialects.grpc.health import HealthServicer
from serving.dialects.grpc.intake import note
from serving.dialects.grpc.management import JobServicer, ModelServicer
from serving.dialects.grpc.task import GrpcTask, grpc_tasks
from serving.enginecast_pb import job_pb2, model_pb2
from serving.host.models import ModelHost
from serving.host.observing import current_client
from serving.security.gate import Gate

CHECK: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]


class Application(ConnectASGIApplication[ModelHost]):
    """Every service of a host, for the clients that the gate admits. Messages have the limits of gRPC."""

    path = "/"

    def __init__(self, host: ModelHost, gate: Gate) -> None:
        found = endpoints(host)
        self.paths = found.keys()
        super().__init__(
            service=host,
            endpoints=lambda _: found,
            interceptors=[Calls(host.observer, gate)],
            read_max_bytes=limits.MESSAGE.most,
            compressions=(GZIP,),
            codecs=CODECS,
        )


def endpoints(host: ModelHost) -> Mapping[str, Any]:
    """Every method by its path."""
    models: ServiceDescriptor = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
    unary = [(method, getattr(ModelServicer(host), method.name)) for method in models.methods]
    jobs: ServiceDescriptor = job_pb2.DESCRIPTOR.services_by_name["JobService"]
    unary += [(method, getattr(JobServicer(host), method.name)) for method in jobs.methods]
    unary.append((CHECK, HealthServicer(host).Check))
    found = {path(task.method): streaming(host, task) for task in grpc_tasks().values()}
    return found | {path(method): single(method, function) for method, function in unary}


def path(method: MethodDescriptor) -> str:
    """The path of a method: /package.Service/Method."""
    return f"/{method.containing_service.full_name}/{method.name}"


def streaming(host: ModelHost, task: GrpcTask) -> Any:
    """The method of a task, which streams its responses."""

    async def run(message: Any, context: Context) -> AsyncIterator[Message]:
        milliseconds = context.timeout_ms
        seconds = None if milliseconds is None else milliseconds / 1000
        async with aclosing(responses(host, task, message, seconds, current_client())) as found:
            async for response in found:
                yield response

    return Endpoint.server_stream(_info(task.method, StreamType.SERVER_STREAM), run)


def single(method: MethodDescriptor, function: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """A method with one response. `function` reads nothing of its context that gRPC alone has."""

    async def run(message: Any, context: Context) -> Any:
        note(path(method).removeprefix("/"), message)
        return await function(message, context)

    return Endpoint.unary(_info(method, StreamType.UNARY), run)


def _info(method: MethodDescriptor, kind: StreamType) -> MethodInfo[Any, Any]:
    takes, gives = map(GetMessageClass, (method.input_type, method.output_type))
    return MethodInfo(
        name=method.name,
        service_name=method.containing_service.full_name,
        input=takes,
        output=gives,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=kind,
    )
