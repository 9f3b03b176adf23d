"""What surrounds each call over HTTP, as over gRPC: its record, its token, and the error it ends with. It begins before
the message is read, so that a call without a token costs nothing.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import grpc
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.interceptor import MetadataInterceptor

from runtime.errors import EnginecastError
from serving.dialects.connect.errors import STATUSES, Refused
from serving.dialects.grpc.intake import AUTHORIZATION
from serving.dialects.grpc.recording import TRACE_KEY, take_over
from serving.dialects.grpc.status import ID_KEY, UNEXPECTED, note, trailers
from serving.host.observing import Observer, Record, recorded
from serving.security.gate import Gate

log = logging.getLogger(__name__)

Context = Any
"""connectrpc.request.RequestContext of any messages."""
Open = tuple[Record, ExitStack]
"""A call that runs: its record, and what ends with it."""


class Calls(MetadataInterceptor[Open]):
    """Records and admits every call of a server."""

    def __init__(self, observer: Observer, gate: Gate) -> None:
        self._observer = observer
        self._gate = gate

    async def on_start(self, ctx: Context) -> Open:
        """Open the record of a call. Raises ConnectError if the call is refused."""
        method, sent, peer = ctx.method, ctx.request_headers, ctx.client_address or ""
        record = Record(method=f"{method.service_name}/{method.name}", client=peer, peer=peer)
        record.traceparent = sent.get(TRACE_KEY, "")
        with ExitStack() as opened:
            opened.enter_context(recorded(record, self._observer))
            try:
                take_over(record, sent.get(ID_KEY, ""))
                ctx.response_headers[ID_KEY] = record.id
                opened.enter_context(self._gate.admitted(record, sent.get(AUTHORIZATION)))
            except EnginecastError as error:
                raise _noted(error, record, ctx) from None
            return record, opened.pop_all()

    async def on_end(self, token: Open, ctx: Context, error: Exception | None, /) -> None:
        """Close the record of a call. Raises the error that the client gets."""
        record, opened = token
        with opened:
            if error is not None:
                raise _noted(error, record, ctx) from error


def _noted(error: Exception, record: Record, ctx: Context) -> ConnectError:
    """The error that the client gets, noted in the record."""
    if isinstance(error, Refused):
        error = error.error
    if isinstance(error, EnginecastError):
        note(record, error)
        for key, value in trailers(error):
            ctx.response_trailers[key] = value
        return Refused(error)
    if isinstance(error, ConnectError):
        record.code = STATUSES[error.code].name
        return error
    log.error("a request failed unexpectedly", exc_info=error)
    record.code = grpc.StatusCode.INTERNAL.name
    return ConnectError(Code.INTERNAL, UNEXPECTED)
