"""Errors as clients of OpenAI expect them: {"error": {"message", "type", "param", "code"}}
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from runtime.errors import ContextLengthExceeded, EnginecastError, InvalidInput, NotFound
from serving.dialects.http.errors import message_of, status_of
from serving.dialects.openai.sse import event
from serving.host.observing import current

TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""The types of an error by its status, where that says more than whose fault it is."""
INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"


def body(error: EnginecastError, status: int) -> Mapping[str, Any]:
    """The JSON of an error with its HTTP status."""
    kind = TYPES.get(status, INVALID if status < 500 else SERVER)
    field = error.field if isinstance(error, InvalidInput) else None
    return {"error": {"message": message_of(error), "type": kind, "param": field, "code": _code(error, status)}}


def failure(error: EnginecastError) -> str:
    """The event that ends a stream with an error."""
    return event(body(error, status_of(error)))


def _code(error: EnginecastError, status: int) -> str | None:
    if isinstance(error, ContextLengthExceeded):
        return "context_length_exceeded"
    if isinstance(error, NotFound) and current() is not None:  # a call without a record is of no endpoint
        return "model_not_found"
    return {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(status)
