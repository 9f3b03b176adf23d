"""A small blocking client for enginecast.v1. It raises the errors that the server reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.dialects.grpc import status
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.outgoing import Metadata, active_span
from serving.enginecast_pb import chat_pb2, image_pb2, job_pb2, job_pb2_grpc, model_pb2, model_pb2_grpc

PLAIN: Final = Connection()

Response = TypeVar("Response", covariant=True)


class _Call(Protocol[Response]):
    def __next__(self) -> Response: ...
    def cancel(self) -> bool: ...


class Responses(Iterator[Response]):
    """The stream of one call. `close` cancels the request on the server and may be called from any thread. Deleting the
    stream does the same.
    """

    def __init__(self, call: _Call[Response]) -> None:
        self._call = call

    def __next__(self) -> Response:
        with _raised():
            return next(self._call)

    def close(self) -> None:
        self._call.cancel()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to a server at "host:port". Every method raises errors of `runtime.errors`; `timeout` is in seconds.

    Closing a stream or ending the program cancels the request on the server. Raises InvalidInput and NotFound for a
    `connection` that cannot be made.
    """

    def __init__(self, address: str, connection: Connection = PLAIN) -> None:
        self._channel = connection.channel(address)
        self._connection = connection
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._job = job_pb2_grpc.JobServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _metadata(self) -> Metadata:
        """What is sent with a call: the token, and the active span."""
        return (*self._connection.metadata, *active_span())

    def close(self) -> None:
        """Cancel running requests and disconnect."""
        self._channel.close()

    def stream(self, method: MethodDescriptor, request: Message, timeout: float | None = None) -> Responses[Any]:
        """The stream of responses to a request that `method`, the one method of a task's service, takes."""
        call: Any = self._channel.unary_stream(  # its stubs leave out that a call is an iterator
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return Responses(call(request, timeout=timeout, metadata=self._metadata))

    def generate(
        self, request: image_pb2.GenerateRequest, timeout: float | None = None
    ) -> Responses[image_pb2.GenerateResponse]:
        """Draw pictures: the stream of ImageService.Generate."""
        return self.stream(image_pb2.DESCRIPTOR.services_by_name["ImageService"].methods[0], request, timeout)

    def chat(self, request: chat_pb2.ChatRequest, timeout: float | None = None) -> Responses[chat_pb2.ChatResponse]:
        """Answer the last message: the stream of ChatService.Chat."""
        return self.stream(chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods[0], request, timeout)

    def models(self, timeout: float | None = None) -> list[model_pb2.Model]:
        """Every model of the server, sorted by name."""
        return list(self._one(self._model.ListModels, model_pb2.ListModelsRequest(), timeout).models)

    def scripts(self, timeout: float | None = None) -> list[model_pb2.ScriptInfo]:
        """Every script that requests may name, sorted by name."""
        return list(self._one(self._model.ListScripts, model_pb2.ListScriptsRequest(), timeout).scripts)

    def status(self, timeout: float | None = None) -> model_pb2.StatusResponse:
        """The server itself, with every model."""
        response: model_pb2.StatusResponse = self._one(self._model.Status, model_pb2.StatusRequest(), timeout)
        return response

    def serves(self, service: str = "", timeout: float | None = None) -> bool:
        """Whether a service of grpc.health.v1 is serving: "", a model's name, or the full name of a service."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        response = self._one(check, health_pb2.HealthCheckRequest(service=service), timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def model(self, name: str, timeout: float | None = None) -> model_pb2.Model:
        """The current status of one model."""
        response: model_pb2.GetModelResponse = self._one(
            self._model.GetModel, model_pb2.GetModelRequest(name=name), timeout
        )
        return response.model

    def load(
        self,
        name: str,
        target: str | None = None,
        timeout: float | None = None,
        keep_alive_seconds: float | None = None,
    ) -> model_pb2.Model:
        """Load a model and wait until it is ready."""
        request = model_pb2.LoadModelRequest(name=name, target=target, keep_alive_seconds=keep_alive_seconds)
        response: model_pb2.LoadModelResponse = self._one(self._model.LoadModel, request, timeout)
        return response.model

    def unload(self, name: str, grace_seconds: float | None = None, timeout: float | None = None) -> model_pb2.Model:
        """Unload a model and wait until its engines are freed."""
        request = model_pb2.UnloadModelRequest(name=name, grace_seconds=grace_seconds)
        response: model_pb2.UnloadModelResponse = self._one(self._model.UnloadModel, request, timeout)
        return response.model

    def stop(self, id: str, timeout: float | None = None) -> None:
        """Stop a request by its id, see `Queued`."""
        self._one(self._job.Stop, job_pb2.StopRequest(id=id), timeout)

    def reload(self, name: str, timeout: float | None = None) -> model_pb2.Model:
        """Load the bundle that is in a model's folder now and wait until it is ready. The model serves meanwhile."""
        request = model_pb2.ReloadModelRequest(name=name)
        response: model_pb2.ReloadModelResponse = self._one(self._model.ReloadModel, request, timeout)
        return response.model

    def _one(self, method: Any, request: Message, timeout: float | None) -> Any:
        """The response of a method that has one."""
        with _raised():
            return method(request, timeout=timeout, metadata=self._metadata)


@contextmanager
def _raised() -> Iterator[None]:
    """Raise gRPC errors as errors of `runtime.errors`."""
    try:
        yield
    except grpc.RpcError as error:
        raise status.error_of(error) from None
