"""What a task is over gRPC: its service, its requests as the core takes them, the core's events as its responses.

One file per task in `serving/dialects/grpc/tasks/`, found by listing the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

import serving.dialects.grpc.tasks
from runtime.listing import modules
from runtime.pipeline import Event
from runtime.task import Request
from serving.enginecast_pb import model_pb2


class Responses(Protocol):
    """The responses to one request."""

    def response(self, event: Event) -> Message | None:
        """The response that an event becomes, None where it becomes none. Takes the events of a request in order."""


@dataclass(frozen=True)
class GrpcTask:
    """One task over gRPC. A file in `serving/dialects/grpc/tasks/` declares one as `TASK`.

    `service` has one method: it takes a message with a field `model` and streams responses. `request` is what the
    core takes for that message, and raises InvalidInput; `responses` makes what answers one request. `kind` is what
    `Model.kind` says of such models.
    """

    task: str
    service: ServiceDescriptor
    request: Callable[[Any], Request]
    responses: Callable[[], Responses]
    kind: model_pb2.ModelKind = model_pb2.MODEL_KIND_UNSPECIFIED


@cache
def grpc_tasks() -> dict[str, GrpcTask]:
    """Every task that is served over gRPC, by name."""
    found = [module.TASK for module in modules(serving.dialects.grpc.tasks)]
    return {task.task: task for task in found}


def task_of(message: Message) -> GrpcTask:
    """The task that a message is a request of."""
    return next(task for task in grpc_tasks().values() if task.service.methods[0].input_type is message.DESCRIPTOR)
