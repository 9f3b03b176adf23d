"""Interceptors of a gRPC server that put a function around every handler."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Handler = Any
"""grpc.RpcMethodHandler, whose attributes the stubs lack."""


class Wrapping(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps the handler of every call."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        """The handler of a call, wrapped. None if there is no such method, as gRPC expects."""
        handler = await continuation(details)
        return None if handler is None else self.wrapped(details.method.removeprefix("/"), handler)

    @abstractmethod
    def wrapped(self, method: str, handler: Handler) -> Handler:
        """A handler around that of a method, such as "enginecast.v1.ImageService/Generate"."""


def calling(handler: Handler) -> Callable[..., Awaitable[Any]]:
    """The function of a handler that takes a stream of messages, as those of `Intake` do."""
    found: Callable[..., Awaitable[Any]] = handler.stream_stream or handler.stream_unary
    return found


def around(handler: Handler, call: Callable[..., Awaitable[Any]]) -> Handler:
    """Such a handler with another function."""
    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)
    return grpc.stream_unary_rpc_method_handler(call, None, handler.response_serializer)
