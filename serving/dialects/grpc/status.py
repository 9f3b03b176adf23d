"""Converts errors of `runtime.errors` to gRPC statuses and back.

The status message is the error's text. In the trailing metadata, `enginecast-error` is the class and `enginecast-field`
the field of an InvalidInput. An unexpected exception becomes INTERNAL; its text is only in the server's log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import grpc

from runtime import errors, limits
from runtime.errors import Cancelled, EnginecastError, InvalidInput
from serving.dialects.grpc.shown import shortened

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

ERROR_KEY: Final = "enginecast-error"
FIELD_KEY: Final = "enginecast-field"
UNEXPECTED: Final = "the server failed unexpectedly: its log says why"
UNREAD_SECONDS = float(limits.UNREAD.most)
FIELD_LENGTH: Final = 200
MESSAGE_BYTES: Final = 4096
"""Longest message sent. It travels percent-encoded in the trailers, which gRPC limits to 8 KiB."""

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


def trailers(error: EnginecastError) -> list[tuple[str, str]]:
    """The class of an error, and the field of an InvalidInput, as metadata."""
    found = [(ERROR_KEY, type(error).__name__)]
    if isinstance(error, InvalidInput):
        found.append((FIELD_KEY, quote(shortened(error.field, FIELD_LENGTH), safe="[]")))
    return found


@asynccontextmanager
async def reported(context: Context) -> AsyncIterator[None]:
    """End the RPC with the status of the exception that the body raises, if any."""
    try:
        yield
    except EnginecastError as error:
        await context.abort(code(error), fitting(str(error)), (*(context.trailing_metadata() or ()), *trailers(error)))
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("an RPC failed unexpectedly")
        await context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED)


async def write(context: Context, response: Any) -> None:
    """Send a response. Raises Cancelled if the client does not read for UNREAD_SECONDS."""
    try:
        async with asyncio.timeout(UNREAD_SECONDS):
            await context.write(response)
    except TimeoutError:
        raise Cancelled(f"the client read nothing for {UNREAD_SECONDS:g} s") from None


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
    metadata = {key: str(value) for key, value in call.trailing_metadata() or ()}
    status, message = call.code(), call.details() or ""
    found = getattr(errors, metadata.get(ERROR_KEY, ""), None)
    if not (isinstance(found, type) and issubclass(found, EnginecastError)):
        found = {code: kind for kind, code in reversed(CODES.items())}.get(status, EnginecastError)
        advice = HANDSHAKE if "handshake" in message.lower() else NO_ANSWER
        message = f"{advice if found is errors.Unavailable else ''}{message} (gRPC status {status.name})"
    error = found.__new__(found, message)  # some constructors take the parts of a message
    if isinstance(error, InvalidInput):
        error.field = metadata.get(FIELD_KEY, "request")
    return error
