"""WebSockets of dialects: as with other calls, each has a record and needs a token, and errors end it with their words.
Pages and hosts are checked before (`serving.dialects.http.pages`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from runtime.errors import EnginecastError, InvalidInput
from serving.dialects.grpc.intake import AUTHORIZATION
from serving.dialects.grpc.recording import TRACE_KEY, take_over
from serving.dialects.grpc.status import ID_KEY, UNEXPECTED
from serving.dialects.http.dialect import dialect_of
from serving.dialects.http.errors import message_of, note
from serving.dialects.http.pages import POLICY, REASON, Unread
from serving.host.observing import Record, recorded

log = logging.getLogger(__name__)

CANCELLED: Final = "CANCELLED"
FAILED: Final = 1011
INVALID: Final = 1003
"""Why a WebSocket is closed: the server failed, or what arrived cannot be accepted (RFC 6455, section 7.4.1)."""


class Left(Exception):
    """The client has left."""


class Messages:
    """The messages of a WebSocket. Iterating has those of the client, texts, and ends when it leaves."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send a message as JSON. Raises Left."""
        try:
            await self._socket.send_text(json.dumps(message))
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: it was closed meanwhile
            raise Left from None

    async def __aiter__(self) -> AsyncIterator[str]:
        while (event := await self._socket.receive())["type"] != "websocket.disconnect":
            if event.get("text") is None:
                raise InvalidInput("message", "is binary, expected text")
            yield event["text"]


@asynccontextmanager
async def admitted(socket: WebSocket) -> AsyncIterator[Messages]:
    """A WebSocket that is open while the block runs. Its record's method is such as "a1111/WS /sdapi/v1/ws/{id}".

    Without a token that allows it, it is not opened. Errors in the block close it; their words are the reason.
    """
    path, state = socket.scope["route"].path, socket.app.state
    dialect = dialect_of(path)
    peer = "{}:{}".format(*socket.scope["client"]) if socket.scope.get("client") else ""
    record = Record(method=f"{dialect.name if dialect else 'http'}/WS {path}", client=peer, peer=peer)
    record.traceparent = socket.headers.get(TRACE_KEY, "")
    with recorded(record, state.observer):
        try:
            take_over(record, socket.headers.get(ID_KEY, ""))
            with state.gate.admitted(record, socket.headers.get(AUTHORIZATION)):
                await socket.accept()
                yield Messages(socket)
                await _close(socket, 1000, "")
        except (Left, Unread, WebSocketDisconnect):
            record.code = CANCELLED
        except EnginecastError as error:
            note(error)
            code = INVALID if isinstance(error, InvalidInput) else POLICY
            await _close(socket, code, message_of(error))
        except Exception as error:
            log.error("a WebSocket failed unexpectedly", exc_info=error)
            note(EnginecastError(UNEXPECTED))
            await _close(socket, FAILED, UNEXPECTED)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    """Close it, if the client has not left. One that was not accepted is refused by HTTP 403."""
    if WebSocketState.DISCONNECTED in (socket.client_state, socket.application_state):
        return
    try:
        await socket.close(code, reason.encode()[:REASON].decode(errors="ignore"))
    except (RuntimeError, Unread, WebSocketDisconnect):
        log.debug("a client left before its WebSocket was closed")
