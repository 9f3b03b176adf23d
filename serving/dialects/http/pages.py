"""What every HTTP request passes first: which pages and which names of this server are allowed, and how long it may
take to arrive and to be read.

A browser sends any page's requests to any address, so a page elsewhere could drive a server that only listens on this
machine. It names the page in `Origin`; pages that are not allowed are refused. A page whose name is later resolved to
this machine (DNS rebinding) has no foreign origin, but its name is in `Host`: names that are not allowed are refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

from runtime import limits
from runtime.errors import DeadlineExceeded, InvalidInput, PermissionDenied, quoted
from serving.dialects.connect.errors import Refused
from serving.dialects.grpc.status import ERROR_KEY, FIELD_KEY, ID_KEY, UNREAD_SECONDS
from serving.dialects.http.dialect import dialect_of

log = logging.getLogger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

LOCAL: Final = ("localhost",)
GRPC: Final = "application/grpc"
GRPC_WEB: Final = f"{GRPC}-web"
POLICY: Final = 1008
"""Why a WebSocket is closed: policy (RFC 6455)."""
REASON: Final = 100
"""Characters of the reason."""
CODES: Final = {400: "invalid_argument", 403: "permission_denied"}
"""Connect's names of the statuses that are answered here."""
METHODS: Final = "GET, HEAD, POST, PUT, DELETE"
REQUEST_HEADERS: Final = (
    "authorization, content-type, connect-protocol-version, connect-timeout-ms, grpc-timeout, x-grpc-web, "
    f"x-user-agent, {ID_KEY}, *"
)
"""What pages may send: what browsers do not understand `*` for, then anything, as client libraries add headers."""
RESPONSE_HEADERS: Final = f"grpc-status, grpc-message, grpc-status-details-bin, {ERROR_KEY}, {FIELD_KEY}, {ID_KEY}"
ARRIVAL_SECONDS = float(limits.ARRIVAL.most)
REMEMBERED: Final = "7200"
"""Seconds for which a browser remembers that a page is allowed."""


def check_origin(origin: str) -> str:
    """The origin, if it is one as browsers send it. Raises InvalidInput."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin:
        raise InvalidInput(
            "http_origins", f"{quoted(origin)} is no origin, expected scheme, host and port such as https://example.org"
        )
    return origin.lower()


class Unread(Exception):
    """A client reads nothing."""


class Pages:
    """An ASGI application in front of another. `origins` are the pages that may call it, `hosts` the names of this
    server besides localhost and addresses.
    """

    def __init__(self, app: App, origins: Iterable[str] = (), hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(map(check_origin, origins))
        self._hosts = frozenset(name.lower() for name in (*LOCAL, *hosts))

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the server itself: it starts and ends
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        except UnicodeDecodeError:
            await _refuse(scope, send, 400, "a header is no UTF-8: send letters, digits and signs of ASCII")
            return
        origin, kind = headers.get("origin", ""), headers.get("content-type", "")
        refused = self._refused(headers, origin)
        if refused:
            await _refuse(scope, send, 403, refused)
        elif scope["type"] == "websocket":
            await self._app(scope, receive, _read(send))
        elif kind.startswith(GRPC) and not kind.startswith(GRPC_WEB):
            await _refuse(scope, send, 415, "this port is for HTTP: that of gRPC is another one (--address)")
        elif scope["method"] == "OPTIONS":
            await _answer(with_headers(send, _preflight(origin)), 204)
        else:
            await self._run(scope, receive, with_headers(send, _allowed(origin)))

    def _refused(self, headers: Mapping[str, str], origin: str) -> str:
        """Why a request is refused, empty if it is not."""
        host = headers.get("host", "")
        if not self._known(host):
            return (
                f"this server is not known as {quoted(host)}: call it by its address, or start it with --http-hosts "
                "and the name"
            )
        if origin and origin.lower() not in self._origins and urlsplit(origin).netloc != host:
            return (
                f"pages of {quoted(origin)} may not call this server: start it with --http-origins and that origin to "
                "allow it"
            )
        return ""

    def _known(self, host: str) -> bool:
        """Whether a Host header has a name of this server, or an address, which no page can make its own."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _run(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, _arriving(receive), _read(send))
        except Unread:
            log.info("a client read nothing for %g s: its request is cancelled", UNREAD_SECONDS)


def _arriving(receive: Receive) -> Receive:
    """`receive` that raises Refused if a request does not arrive in time."""
    deadline = asyncio.get_running_loop().time() + ARRIVAL_SECONDS
    whole = False

    async def timed() -> Event:
        nonlocal whole
        if whole:  # from now on it waits for the client to leave
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                event = await receive()
        except TimeoutError:
            raise Refused(
                DeadlineExceeded(f"the request did not arrive within {ARRIVAL_SECONDS:g} s: send it again")
            ) from None
        whole = not event.get("more_body", False)
        return event

    return timed


def _read(send: Send) -> Send:
    """`send` that raises Unread if the client does not read."""

    async def timed(event: Event) -> None:
        try:
            async with asyncio.timeout(UNREAD_SECONDS):
                await send(event)
        except TimeoutError:
            raise Unread from None
        await asyncio.sleep(0)  # writing into a buffer does not let others run: a client that left would go unnoticed

    return timed


def bounded(receive: Receive, most: int = limits.MESSAGE.most) -> Receive:
    """`receive` that raises InvalidInput for a body of more than so many bytes."""
    arrived = 0

    async def counted() -> Event:
        nonlocal arrived
        event = await receive()
        arrived += len(event.get("body", b""))
        if arrived > most:
            raise InvalidInput("body", f"has more than {most:,} bytes: send less, or smaller pictures")
        return event

    return counted


def with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """`send` that adds headers to the response."""
    added = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def adding(event: Event) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event.get("headers", ()), *added]}
        await send(event)

    return adding


def _allowed(origin: str) -> Mapping[str, str]:
    """The headers by which a browser lets a page read a response."""
    if not origin:
        return {}
    return {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": RESPONSE_HEADERS,
        "vary": "Origin",
    }


def _preflight(origin: str) -> Mapping[str, str]:
    """The headers by which a browser lets a page send a request."""
    if not origin:
        return {}
    return {
        **_allowed(origin),
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": REQUEST_HEADERS,
        "access-control-max-age": REMEMBERED,
    }


async def _refuse(scope: Any, send: Send, status: int, message: str) -> None:
    """Refuse a request before the application, in the words of its dialect."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": POLICY, "reason": message[:REASON]})
        return
    dialect = dialect_of(scope["path"])
    error = InvalidInput("headers", message) if status == 400 else PermissionDenied(message)
    connect = {"code": CODES.get(status, "unknown"), "message": message}
    await _answer(send, status, connect if dialect is None else dialect.body(error, status))


async def _answer(send: Send, status: int, content: Mapping[str, Any] | None = None) -> None:
    """A response without the application."""
    body = b"" if content is None else json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers if body else []})
    await send({"type": "http.response.body", "body": body})
