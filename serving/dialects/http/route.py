"""What surrounds each call of a dialect, as over gRPC: its record, its token, the size of its body, and that it ends
when its client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from fastapi.params import Form
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from runtime import limits
from runtime.errors import EnginecastError, InvalidInput
from serving.dialects.grpc.intake import AUTHORIZATION
from serving.dialects.grpc.recording import TRACE_KEY, take_over
from serving.dialects.grpc.status import ID_KEY
from serving.dialects.http import errors
from serving.dialects.http.dialect import dialect_of
from serving.dialects.http.pages import Event, Receive, Send, Unread
from serving.dialects.http.values import check_values
from serving.host.observing import Record, recorded

CANCELLED: Final = "CANCELLED"
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Route(APIRoute):
    """A route of a dialect. Its record's method is such as "ollama/POST /api/chat"."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()
        form = self.body_field is not None and isinstance(self.body_field.field_info, Form)
        check = _check_end if form else check_values

        async def checked(request: Request) -> Response:
            check(await request.body(), errors.BODY)
            return await handler(request)

        return checked

    async def handle(self, scope: Any, receive: Receive, send: Send) -> None:
        state, headers = scope["app"].state, Headers(scope=scope)
        dialect, peer = dialect_of(self.path), "{}:{}".format(*scope["client"]) if scope.get("client") else ""
        method = f"{dialect.name if dialect else 'http'}/{scope['method']} {self.path_format}"
        record = Record(method=method, client=peer, peer=peer, traceparent=headers.get(TRACE_KEY, ""))
        with recorded(record, state.observer):
            try:
                take_over(record, headers.get(ID_KEY, ""))
                with state.gate.admitted(record, headers.get(AUTHORIZATION)):
                    await self._run(scope, _bounded(receive), _named(send, record), record)
            except EnginecastError as error:
                await errors.response(self.path, error)(scope, receive, _named(send, record))
            except HTTPException as error:  # another verb
                await (await errors.refused(Request(scope), error))(scope, receive, _named(send, record))

    async def _run(self, scope: Any, receive: Receive, send: Send, record: Record) -> None:
        """Run the endpoint until it ends or the client leaves."""
        inner, begun = super().handle, False

        async def noted(event: Event) -> None:
            nonlocal begun
            begun = True
            await send(event)

        async def call(body: Receive) -> None:
            try:
                await inner(scope, body, noted)
            except (EnginecastError, HTTPException, Unread):
                raise
            except Exception as error:
                failed = await errors.unexpected(Request(scope), error)
                if begun:  # the client sees that the connection breaks off
                    raise
                await failed(scope, receive, send)

        if not await while_connected(call, receive):
            record.code = CANCELLED


async def while_connected(call: Callable[[Receive], Awaitable[None]], receive: Receive) -> bool:
    """Run `call` with a `receive` of its own, and cancel it if the client leaves after its body has arrived. Returns
    whether it ran to its end.
    """
    whole, left = asyncio.Event(), asyncio.Event()

    async def body() -> Event:
        if whole.is_set():
            await left.wait()
            return {"type": "http.disconnect"}
        event = await receive()
        if not event.get("more_body", False):
            whole.set()
        if event["type"] == "http.disconnect":
            left.set()
        return event

    async def watch() -> None:
        await whole.wait()
        while not left.is_set():
            if (await receive())["type"] == "http.disconnect":
                left.set()

    running, watching = asyncio.ensure_future(call(body)), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            return True
        return False
    finally:
        watching.cancel()
        running.cancel()
        await asyncio.wait({running, watching})


def _check_end(data: bytes, field: str) -> None:
    """Raise InvalidInput for a form of parts (RFC 7578) that breaks off: its last part would be dropped."""
    if data.startswith(b"--") and not data.rstrip().endswith(b"--"):
        raise InvalidInput(field, "is a form that breaks off: send it again, with its last boundary")


def _bounded(receive: Receive) -> Receive:
    """`receive` that raises InvalidInput for a body that is too large."""
    arrived = 0

    async def counted() -> Event:
        nonlocal arrived
        event = await receive()
        arrived += len(event.get("body", b""))
        if arrived > limits.MESSAGE.most:
            raise InvalidInput(
                errors.BODY, f"has more than {limits.MESSAGE.most:,} bytes: send less, or smaller pictures"
            )
        return event

    return counted


def _named(send: Send, record: Record) -> Send:
    """`send` that adds the id of the request to the response."""

    async def adding(event: Event) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event.get("headers", ()), (ID_KEY.encode(), record.id.encode())]}
        await send(event)

    return adding
