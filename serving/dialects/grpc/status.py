"""Converts errors of `runtime.errors` to gRPC statuses and back.

The status message is the error's text. In the trailing metadata, `enginecast-error` is the class and `enginecast-field`
the field of an InvalidInput; `grpc-status-details-bin` has the same and the time to wait as google.rpc messages. An
unexpected exception becomes INTERNAL; its text is only in the server's log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote, unquote

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from runtime import errors, limits
from runtime.errors import Cancelled, EnginecastError, InvalidInput
from serving.host.observing import Record
from serving.host.shown import shortened

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

ID_KEY: Final = "x-request-id"
ERROR_KEY: Final = "enginecast-error"
FIELD_KEY: Final = "enginecast-field"
UNEXPECTED: Final = "the server failed unexpectedly: its log says why"
UNREAD_SECONDS = float(limits.UNREAD.most)
FIELD_LENGTH: Final = 120
MESSAGE_BYTES: Final = 3072
"""Longest message sent. The message and the field travel percent-encoded in the trailers, and once more in the details.
gRPC drops some of the trailers that are longer than 8 KiB, and with them the status.
"""
DETAILS_KEY: Final = "grpc-status-details-bin"
DOMAIN: Final = "enginecast"
"""Of the reasons in details: the names of our errors."""

NO_ANSWER: Final = (
    "no server answers there, or it went away: start one with `enginecast serve`, check the address, and whether the "
    "server requires TLS or a certificate of yours: "
)
HANDSHAKE: Final = (
    "the server could not be trusted, or does not use TLS: check the authority's certificate (--ca), and that the "
    "server's has not expired and names this host: "
)
"""Advice on gRPC's own UNAVAILABLE."""

CODES: Final[dict[type[EnginecastError], grpc.StatusCode]] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.SourceError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EngineUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MissingDependency: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EnginecastError: grpc.StatusCode.INTERNAL,
}
"""Other classes have the code of their nearest base class: a ContextLengthExceeded that of InvalidInput."""


def code(error: EnginecastError) -> grpc.StatusCode:
    """The status code of an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def note(record: Record, error: EnginecastError) -> None:
    """Note in the record of a call that it ended with an error."""
    record.code, record.error = code(error).name, type(error).__name__


def trailers(error: EnginecastError) -> list[tuple[str, str]]:
    """The class of an error, and the field of an InvalidInput, as metadata."""
    found = [(ERROR_KEY, type(error).__name__)]
    if isinstance(error, InvalidInput):
        found.append((FIELD_KEY, quote(shortened(error.field, FIELD_LENGTH), safe="[]")))
    return found


def details(error: EnginecastError) -> list[Message]:
    """What the status of an error says to programs, as google.rpc messages: its class, the field, the time to wait."""
    found: list[Message] = [error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)]
    if isinstance(error, InvalidInput):
        field, reason = shortened(error.field, FIELD_LENGTH), str(error).removeprefix(f"{error.field}: ")
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=fitting(reason))
        found.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_seconds * 1e9))
        found.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return found


def rich(error: EnginecastError) -> bytes:
    """The google.rpc.Status of an error, serialized."""
    status = status_pb2.Status(code=code(error).value[0], message=fitting(str(error)))
    for detail in details(error):
        status.details.add().Pack(detail)
    return bytes(status.SerializeToString())


@asynccontextmanager
async def reported(context: Context) -> AsyncIterator[None]:
    """End the RPC with the status of the exception that the body raises, if any."""
    try:
        yield
    except EnginecastError as error:
        metadata = (*(context.trailing_metadata() or ()), *trailers(error), (DETAILS_KEY, rich(error)))
        await context.abort(code(error), fitting(str(error)), metadata)
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("an RPC failed unexpectedly")
        await context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED)


class Sending:
    """Sends the responses of one call: `with Sending(context) as write: await write(response)`, in one task.

    `write` raises Cancelled if the client does not read for UNREAD_SECONDS. One timer watches all responses: one for
    each would cost a good part of what sending a token costs.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._began: float | None = None
        self._late = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Callable[[Any], Awaitable[None]]:
        self._watch(self._loop.time())
        return self._write

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _write(self, response: Any) -> None:
        self._began = self._loop.time()
        try:
            await self._context.write(response)
        except asyncio.CancelledError:
            if not self._late or self._task is None or self._task.uncancel():
                raise
            raise Cancelled(f"the client read nothing for {UNREAD_SECONDS:g} s") from None
        finally:
            self._began = None

    def _watch(self, since: float) -> None:
        self._timer = self._loop.call_at(since + UNREAD_SECONDS, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        began = now if self._began is None else self._began
        if now < began + UNREAD_SECONDS:
            self._watch(began)
        elif self._task is not None:
            self._late = True
            self._task.cancel()


def fitting(message: str) -> str:
    """The message, shortened until its percent-encoding fits into the trailers."""
    message = shortened(message)
    while len(quote(message)) > MESSAGE_BYTES:
        message = message[: len(message) * 3 // 4] + "…"
    return message


def error_of(call: grpc.RpcError) -> EnginecastError:
    """The error that the server reported; for gRPC's own statuses, the error with the same code."""
    if not isinstance(call, grpc.Call):
        return EnginecastError(f"the call failed: {call}")
    metadata: dict[str, Any] = dict(call.trailing_metadata() or ())
    status, message = call.code(), call.details() or ""
    found = getattr(errors, str(metadata.get(ERROR_KEY, "")), None)
    if not (isinstance(found, type) and issubclass(found, EnginecastError)):
        found = {code: kind for kind, code in reversed(CODES.items())}.get(status, EnginecastError)
        advice = HANDSHAKE if "handshake" in message.lower() else NO_ANSWER
        message = f"{advice if found is errors.Unavailable else ''}{message} (gRPC status {status.name})"
    error = found.__new__(found, message)  # some constructors take the parts of a message
    if isinstance(error, InvalidInput):
        error.field = unquote(str(metadata.get(FIELD_KEY, "request")))
        error.reason = message.removeprefix(f"{error.field}: ")
    error.retry_seconds = _retry_seconds(metadata.get(DETAILS_KEY, b""), error)
    error.request_id = str(metadata.get(ID_KEY, ""))
    return error


def _retry_seconds(details: Any, error: EnginecastError) -> float | None:
    """The time to wait that a server sent."""
    status, retry = status_pb2.Status(), error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(details)
    except (DecodeError, TypeError):
        return error.retry_seconds
    for detail in status.details:
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return error.retry_seconds
