"""ScaleService, whose messages are described here since proto/ has none for it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from runtime.tasks.scale import Scaled, ScaleRequest

from runtime.pipeline import Event
from serving.dialects.grpc.task import GrpcTask

FILE: Final = "toy/scale.proto"


def described() -> FileDescriptorProto:
    file = FileDescriptorProto(name=FILE, package="toy", syntax="proto3")
    for name in ("ScaleMessage", "ScaleResponse"):
        message = file.message_type.add(name=name)
        text, number = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.TYPE_FLOAT
        message.field.add(name="model", number=1, type=text, label=FieldDescriptorProto.LABEL_OPTIONAL)
        message.field.add(name="numbers", number=2, type=number, label=FieldDescriptorProto.LABEL_REPEATED)
    service = file.service.add(name="ScaleService")
    service.method.add(name="Scale", input_type=".toy.ScaleMessage", output_type=".toy.ScaleResponse")
    service.method[0].server_streaming = True
    return file


Default().AddSerializedFile(described().SerializeToString())
DESCRIPTOR = Default().FindFileByName(FILE)
ScaleMessage, ScaleResponse = (GetMessageClass(DESCRIPTOR.message_types_by_name[name]) for name in
                               ("ScaleMessage", "ScaleResponse"))  # fmt: skip


class ScaleResponses:
    def response(self, event: Event) -> Message | None:
        return ScaleResponse(numbers=event.numbers) if isinstance(event, Scaled) else None


def scale_request(message: Any) -> ScaleRequest:
    return ScaleRequest(tuple(message.numbers))


def scale_message(model: str, request: ScaleRequest) -> Message:
    return ScaleMessage(model=model, numbers=request.numbers)


def scale_events(responses: Iterator[Any]) -> Generator[Event, None, None]:
    for response in responses:
        yield Scaled(tuple(response.numbers))


TASK: Final = GrpcTask(
    ScaleRequest.task,
    DESCRIPTOR.services_by_name["ScaleService"],
    scale_request,
    ScaleResponses,
    scale_message,
    scale_events,
)
