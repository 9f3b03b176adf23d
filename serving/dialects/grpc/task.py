"""A task over gRPC: its service, and the conversion of its requests and responses.

Each task is a file in `serving/dialects/grpc/tasks/`, found by listing the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

import serving.dialects.grpc.tasks
from runtime.listing import modules
from runtime.pipeline import Event
from runtime.task import Request
from serving.enginecast_pb import model_pb2

MODEL: Final[str] = model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
"""The service of the models' states."""


class Responses(Protocol):
    """The responses to one request."""

    def response(self, event: Event) -> Message | None:
        """Convert an event to a response, None if it has none. Called with the events of a request in order."""


@dataclass(frozen=True)
class GrpcTask:
    """One task over gRPC. A file in `serving/dialects/grpc/tasks/` declares one as `TASK`.

    `service` has one method: it takes a message with a field `model` and streams responses. On a server, `request`
    converts that message to the core's request and raises InvalidInput; `responses` makes a converter for the responses
    to one request. On a client, `message` converts a model's name and a request to that message, and `events` the
    responses to events. `kind` is the value of `Model.kind` for models of this task.

    `opening` is what a message begins with that a model need not read again if it has read it before, b"" if there is
    nothing of the kind: of several replicas, the one that has read it gets the message.
    """

    task: str
    service: ServiceDescriptor
    request: Callable[[Any], Request]
    responses: Callable[[], Responses]
    message: Callable[[str, Any], Message]
    events: Callable[[Iterator[Any]], Generator[Event, None, None]]
    kind: model_pb2.ModelKind = model_pb2.MODEL_KIND_UNSPECIFIED
    opening: Callable[[Any], bytes] = lambda message: b""

    @property
    def method(self) -> MethodDescriptor:
        """The service's method."""
        return self.service.methods[0]


@cache
def grpc_tasks() -> dict[str, GrpcTask]:
    """Every task that is served over gRPC, by name."""
    found = [module.TASK for module in modules(serving.dialects.grpc.tasks)]
    return {task.task: task for task in found}


def task_of(message: Message) -> GrpcTask:
    """The task whose service takes this message."""
    return next(task for task in grpc_tasks().values() if task.method.input_type is message.DESCRIPTOR)
