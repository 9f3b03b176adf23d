"""A record of each call: its id, what called it, how it ended.

A client may name its request in the metadata `x-request-id`; others get an id. The trailing metadata has it. The
metadata `traceparent` joins the request to a trace of the client's (W3C Trace Context).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc

from runtime import limits
from runtime.errors import InvalidInput, quoted
from serving.dialects.grpc.status import ERROR_KEY, ID_KEY, Context, reported
from serving.dialects.grpc.wrapping import Handler, Wrapping, around, calling
from serving.host.observing import Observer, Record, recorded

TRACE_KEY: Final = "traceparent"


class Recording(Wrapping):
    """Records every call of a server. It comes before the interceptor that receives requests, whose handlers write
    their responses themselves.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def wrapped(self, method: str, handler: Handler) -> Handler:
        """A handler that records the calls of another one, which `Intake` made."""
        inner = calling(handler)

        async def call(messages: Any, context: Context) -> Any:
            record = Record(method=method, client=_sender(context), peer=context.peer())
            with recorded(record, self._observer):
                try:
                    async with reported(context):
                        _name(record, context)
                    return await inner(messages, context)
                except asyncio.CancelledError:
                    record.code = _left(context).name
                    raise
                except grpc.aio.AbortError:
                    record.code = context.code().name  # that which the call was aborted with
                    record.error = str(dict(context.trailing_metadata()).get(ERROR_KEY, ""))
                    raise

        return around(handler, call)


def _sender(context: Context) -> str:
    """The name in the client's certificate if it has one, else its address."""
    names = context.auth_context().get("x509_common_name", ())
    return next((quoted(name.decode(errors="replace")) for name in names), context.peer())


def _name(record: Record, context: Context) -> None:
    """Take over the id and the trace that the client sent, and return the id."""
    sent = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    record.traceparent = sent.get(TRACE_KEY, "")
    context.set_trailing_metadata(((ID_KEY, record.id),))
    take_over(record, sent.get(ID_KEY, ""))
    context.set_trailing_metadata(((ID_KEY, record.id),))


def take_over(record: Record, given: str) -> None:
    """Use the id that a client sent, if any. Raises InvalidInput for an id that cannot be used."""
    limits.REQUEST_ID.length(ID_KEY, given)
    if not given.isprintable():
        raise InvalidInput(ID_KEY, "has characters that cannot be printed: use letters, digits and dashes")
    record.id = given or record.id


def _left(context: Context) -> grpc.StatusCode:
    """The status of a call that gRPC cancelled."""
    left = context.time_remaining()
    return grpc.StatusCode.CANCELLED if left is None or left > 0 else grpc.StatusCode.DEADLINE_EXCEEDED
