"""Receives the requests of all calls: checks their tokens, limits the time, the size and the number per connection,
then parses them.

By default gRPC reads and parses a request before any code of the server runs, and it answers invalid bytes with UNKNOWN
and a traceback. An interceptor therefore replaces every handler by one for streams of bytes. On the wire nothing
differs.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import DecodeError, Message

from runtime import limits
from runtime.errors import DeadlineExceeded, InvalidInput
from runtime.placing.heap import give_back
from serving.dialects.grpc.status import Context, Sending, reported
from serving.dialects.grpc.wire import fields_within
from serving.dialects.grpc.wrapping import Handler, Wrapping
from serving.host.observing import Record, current
from serving.host.turns import Turns
from serving.security.gate import Gate
from serving.security.scopes import is_management

END: Final = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
AUTHORIZATION: Final = "authorization"
"""The metadata that has a token."""
REQUEST: Final = "request"
"""The field in errors about a whole message."""
NOTED: Final = 1 << 12
"""The most bytes of a management request whose content is in the audit log."""
LARGE: Final = 1 << 20
"""The memory of messages with more bytes is returned to the system."""


class Intake(Wrapping):
    """Receives the requests of all calls of a server."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._turns = Turns(limits.ARRIVING.most)
        self._returning: asyncio.Task[None] | None = None

    def wrapped(self, method: str, handler: Handler) -> Handler:
        """A handler that receives the requests of `method`, such as "enginecast.v1.ImageService/Generate", for another
        one.
        """

        async def one(_: Any, context: Context) -> Any:
            async with self._admitted(method, context):
                message = await self._message(handler, context)
                note(method, message)
                return await handler.unary_unary(message, context)

        async def stream(_: Any, context: Context) -> None:
            async with self._admitted(method, context):
                await handler.unary_stream(await self._message(handler, context), context)

        async def both(_: Any, context: Context) -> None:
            async with (
                self._admitted(method, context),
                aclosing(handler.stream_stream(self._messages(handler, context), context)) as responses,
            ):
                with Sending(context) as write:
                    async for response in responses:
                        await write(response)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(both, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(one, None, handler.response_serializer)

    async def close(self) -> None:
        """Leave nothing running when the server has stopped."""
        if self._returning is not None:
            self._returning.cancel()
            await asyncio.wait([self._returning])

    @asynccontextmanager
    async def _admitted(self, method: str, context: Context) -> AsyncIterator[None]:
        """Runs a call if its token allows it, and ends it with the status of the error that the block raises."""
        sent = dict(context.invocation_metadata() or ())
        record = current() or Record(method=method)
        async with reported(context):
            with self._gate.admitted(record, str(sent.get(AUTHORIZATION, ""))):
                yield

    async def _message(self, handler: Handler, context: Context) -> Any:
        """The request of a call with a single one. Raises InvalidInput, DeadlineExceeded."""
        try:  # flow control holds back the other requests of a connection
            async with asyncio.timeout(limits.ARRIVAL.most), self._turns(context.peer()):
                data = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request did not arrive within {limits.ARRIVAL.most} s: send it again"
            ) from None
        if data is END:
            raise InvalidInput(REQUEST, "is missing: the call ended before it arrived")
        if len(data) > LARGE and (self._returning is None or self._returning.done()):
            self._returning = asyncio.create_task(_return_memory())
        return parse(data, handler.request_deserializer)

    async def _messages(self, handler: Handler, context: Context) -> AsyncIterator[Any]:
        """The requests of a call that has a stream of them."""
        while (data := await context.read()) is not END:
            yield parse(data, handler.request_deserializer)


def note(method: str, message: Message) -> None:
    """Note in the call's record what a management call requests."""
    if is_management(method) and (record := current()):
        size = message.ByteSize()
        record.request = (
            MessageToJson(message, indent=None, preserving_proto_field_name=True)
            if size <= NOTED
            else f"{size:,} bytes"
        )


async def _return_memory() -> None:
    """Return the memory of large messages to the system, about when they are no longer needed.

    An error refers to the frames it passed, and these refer to the message and the error. Only the garbage collector
    frees such cycles, and the C library keeps freed memory unless it is trimmed.
    """
    await asyncio.sleep(1)
    gc.collect()
    await asyncio.to_thread(give_back)


def parse(data: bytes, deserialize: Callable[[bytes], Any]) -> Any:
    """Parse a message; `deserialize` is the `FromString` of its class. Raises InvalidInput."""
    kind = deserialize.__self__.DESCRIPTOR  # type: ignore[attr-defined]  # a class method's class
    if not fields_within(data, kind, limits.FIELDS.most):
        raise InvalidInput(REQUEST, f"has more than {limits.FIELDS.most:,} fields, nested ones included: send fewer")
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidInput(REQUEST, f"is no {kind.full_name}: its {len(data):,} bytes cannot be decoded") from None
