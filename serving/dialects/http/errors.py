"""Errors of `runtime.errors` as HTTP responses, in the words of each dialect.

The statuses are those that google.rpc gives to codes of gRPC (https://github.com/googleapis/googleapis, code.proto),
except that what is wrong with a server's own bundles is 500, not 400.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Final

import grpc
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.errors import EnginecastError, InvalidInput, NotFound
from serving.dialects.grpc import status as grpc_status
from serving.dialects.grpc.status import ERROR_KEY, UNEXPECTED, code
from serving.dialects.http.dialect import dialect_of
from serving.host.observing import current
from serving.host.shown import shortened

log = logging.getLogger(__name__)

STATUSES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""Of other codes it is 500."""
BODY: Final = "body"


def status_of(error: EnginecastError) -> int:
    """The HTTP status of an error."""
    return STATUSES.get(code(error), 500)


def message_of(error: EnginecastError) -> str:
    """The text of an error, at most as long as that of other protocols."""
    return shortened(str(error))


def note(error: EnginecastError) -> None:
    """Note in the call's record how it ended."""
    if (record := current()) is not None:
        grpc_status.note(record, error)


def response(path: str, error: EnginecastError, status: int | None = None) -> Response:
    """The response to a request for `path` that ended with an error, noted in the call's record."""
    note(error)
    status = status_of(error) if status is None else status
    dialect = dialect_of(path)
    content = {"error": message_of(error)} if dialect is None else dict(dialect.body(error, status))
    headers = {ERROR_KEY: type(error).__name__}
    if error.retry_seconds is not None:
        headers["retry-after"] = str(math.ceil(error.retry_seconds))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


async def known(request: Request, error: Exception) -> Response:
    """The response to a request that ended with an error of ours."""
    assert isinstance(error, EnginecastError)
    return response(request.url.path, error)


async def invalid(request: Request, error: Exception) -> Response:
    """The response to a request whose fields FastAPI refused."""
    assert isinstance(error, RequestValidationError)
    return response(request.url.path, refusal(error.errors()[0]))


def refusal(found: Any) -> InvalidInput:
    """The error of a field, of pydantic's description."""
    field = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in found["loc"][1:]).strip(".") or BODY
    reasons = {
        "extra_forbidden": "is not known here: leave it out",
        "missing": "is missing, and is required",
        "json_invalid": "is no JSON text",
    }
    if found["type"] == "json_invalid":
        field = BODY
    message = str(found["msg"]).removeprefix("Value error, ")
    return InvalidInput(field, reasons.get(found["type"], f"{message[:1].lower()}{message[1:]}"))


async def refused(request: Request, error: Exception) -> Response:
    """The response to a request that no endpoint takes, or whose body could not be read."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    cause = getattr(error.__cause__, "error", error.__cause__)
    if isinstance(cause, EnginecastError):
        return response(path, cause)
    if error.status_code == 404:
        return response(path, NotFound(f"there is nothing at {shortened(path, 100)}: check the address"))
    if error.status_code == 405:
        return response(path, InvalidInput("method", f"{request.method} is not one of {shortened(path, 100)}"), 405)
    if isinstance(error.__context__, MultiPartException):
        found = error.__context__.message.rstrip(".")
        return response(path, InvalidInput(BODY, f"is no form that can be read: {found[:1].lower()}{found[1:]}"))
    return response(path, InvalidInput(BODY, "cannot be read: send it again, as JSON"), error.status_code)


async def unexpected(request: Request, error: Exception) -> Response:
    """The response to a request that failed because of a fault of ours."""
    log.error("a request failed unexpectedly", exc_info=error)
    return response(request.url.path, EnginecastError(UNEXPECTED))


HANDLERS: Final[dict[int | type[Exception], Any]] = {
    EnginecastError: known,
    RequestValidationError: invalid,
    HTTPException: refused,
}
"""What answers to which error. Others are for `unexpected`."""
