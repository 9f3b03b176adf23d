"""The services of enginecast.v1 in Ray Serve's own gRPC server.

Ray would send a call to the application that the metadata `application` names, without the client's deadline, and it
answers errors of a stream without trailing metadata. The services here run in the ingress itself: they choose the
application by the model of the request, and send the client what a server of one process sends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from runtime import limits
from runtime.errors import InvalidInput, PermissionDenied
from serving.cluster.affinity import session
from serving.cluster.view import View
from serving.cluster.wire import Call
from serving.dialects.grpc.health import HealthServicer
from serving.dialects.grpc.intake import REQUEST, Intake
from serving.dialects.grpc.management import ModelReader
from serving.dialects.grpc.recording import Recording
from serving.dialects.grpc.status import Context, Sending, reported
from serving.dialects.grpc.task import GrpcTask, grpc_tasks
from serving.dialects.grpc.wrapping import around, calling
from serving.enginecast_pb import common_pb2, model_pb2
from serving.host.observing import Observer, current
from serving.security.addresses import is_loopback
from serving.security.gate import Gate

READING: Final = ("ListModels", "GetModel", "Status", "ListScripts")
"""The methods of ModelService that a cluster has: its replicas are not loaded and unloaded one by one."""


def add_services(_: object, server: Any) -> None:
    """Add all services to a server. Ray calls this in the process of its ingress."""
    _add_all(server, lambda handler: handler)


def add_local_services(_: object, server: Any) -> None:
    """Add all services to a server, for calls from this machine. Ray's server listens on every address."""
    _add_all(server, local)


def _add_all(server: Any, guarded: Callable[[Any], Any]) -> None:
    view = View()
    models, health = ModelReader(view), HealthServicer(view)
    add = partial(_add, server, guarded)
    for task in grpc_tasks().values():
        add(task.service, {task.method.name: answering(view, task)})
    add(model_pb2.DESCRIPTOR.services_by_name["ModelService"], {name: getattr(models, name) for name in READING})
    add(health_pb2.DESCRIPTOR.services_by_name["Health"], {"Check": health.Check, "Watch": health.Watch})


def _add(
    server: Any,
    guarded: Callable[[Any], Any],
    service: ServiceDescriptor,
    functions: dict[str, Callable[..., Any]],
) -> None:
    """Add methods of one service, which run in the ingress."""
    recording, intake = Recording(Observer()), Intake(Gate())
    handlers = {}
    for name, function in functions.items():
        method = service.methods_by_name[name]
        path = f"{service.full_name}/{name}"
        handlers[name] = guarded(recording.wrapped(path, intake.wrapped(path, handler(method, function))))
    server.add_passthrough_service(service.full_name)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def handler(method: MethodDescriptor, function: Callable[..., Any]) -> Any:
    """The handler of a method with one request. A stream writes its responses itself, serialized or not."""
    takes = GetMessageClass(method.input_type)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(function, takes.FromString, serialized)
    return grpc.unary_unary_rpc_method_handler(function, takes.FromString, serialized)


def local(handler: Any) -> Any:
    """A handler that refuses calls from other machines before their requests are read."""
    inner = calling(handler)

    async def call(messages: Any, context: Context) -> Any:
        async with reported(context):
            if not is_loopback(unquote(context.peer()).partition(":")[2]):
                raise PermissionDenied(
                    "this server serves its own machine alone: start it with an --address of another interface and "
                    "--insecure, or call it through a proxy there"
                )
        return await inner(messages, context)

    return around(handler, call)


def serialized(response: bytes | Message) -> bytes:
    """A response on the wire. Those of replicas are serialized already."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def answering(view: View, task: GrpcTask) -> Callable[[Any, Context], Awaitable[None]]:
    """The method of a task's service: a replica answers."""

    async def answer(message: Any, context: Context) -> None:
        _check(message)
        name, key = message.model, session(task, message)
        record = current()
        assert record is not None
        record.task = task.task
        sent = record.id, record.method, record.client, record.traceparent
        call = Call(task.task, message.SerializeToString(), context.time_remaining(), *sent)
        del message
        with Sending(context) as write:
            async with aclosing(view.answers(name, call, key)) as parts:
                record.model = name
                async for part in parts:
                    await write(part.message)

    return answer


def _check(message: Any) -> None:
    """Raise InvalidInput for what a cluster does not have: large messages, which Ray's server lets pass, and results
    that are kept, which only one of the replicas would have.
    """
    size = message.ByteSize()
    if size > limits.MESSAGE.most:
        raise InvalidInput(REQUEST, f"has {size:,} bytes, expected at most {limits.MESSAGE.most:,}")
    if message.terms.collect:
        raise InvalidInput("terms.collect", "is not possible on a cluster: no result is kept there")
    if message.terms.on_disconnect == common_pb2.ON_DISCONNECT_FINISH:
        raise InvalidInput(
            "terms.on_disconnect", "is ON_DISCONNECT_FINISH, which a cluster does not have: it keeps no results"
        )
