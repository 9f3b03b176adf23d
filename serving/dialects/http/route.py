"""What surrounds each call of a dialect, as over gRPC: its record, its token, the size of its body, and that it ends
when its client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi.params import Form
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from runtime.errors import EnginecastError, InvalidInput
from serving.dialects.grpc.status import ID_KEY
from serving.dialects.http import errors
from serving.dialects.http.calls import CANCELLED, admitted, record_of
from serving.dialects.http.pages import Event, Receive, Send, Unread, bounded, with_headers
from serving.dialects.http.values import check_values
from serving.host.observing import Record, recorded

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
        state = scope["app"].state
        record = record_of(scope, scope["method"], self.path_format)
        send = _named(send, record)
        with recorded(record, state.observer):
            try:
                with admitted(record, state.gate, scope):
                    await self._run(scope, bounded(receive), send, record)
            except EnginecastError as error:
                await errors.response(self.path, error)(scope, receive, send)
            except HTTPException as error:  # another verb
                await (await errors.refused(Request(scope), error))(scope, receive, send)

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


def _named(send: Send, record: Record) -> Send:
    """`send` that adds the id of the request to the response."""

    async def adding(event: Event) -> None:
        await with_headers(send, {ID_KEY: record.id})(event)  # the client may give it an id meanwhile

    return adding
