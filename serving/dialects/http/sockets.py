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
from serving.dialects.grpc.status import UNEXPECTED
from serving.dialects.http import calls
from serving.dialects.http.errors import message_of, note
from serving.dialects.http.pages import POLICY, REASON, Unread
from serving.host.observing import recorded

log = logging.getLogger(__name__)

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
    state = socket.app.state
    record = calls.record_of(socket.scope, "WS", socket.scope["route"].path)
    with recorded(record, state.observer):
        try:
            with calls.admitted(record, state.gate, socket.scope):
                await socket.accept()
                yield Messages(socket)
                await _close(socket, 1000, "")
        except (Left, Unread, WebSocketDisconnect):
            record.code = calls.CANCELLED
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
