"""The HTTP server of a `ModelHost`, beside that of gRPC."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime import limits
from runtime.errors import Unavailable
from serving.dialects.http.pages import App, Pages
from serving.security.addresses import split
from serving.security.https import Tls
from serving.security.protection import OPEN, Security

BACKLOG: Final = 1024


class Connection(H11Protocol):
    """A connection that is closed if its next request does not begin in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._last: Any = None
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """From now on the connection is a WebSocket, which may be silent for long."""
        self._timer.cancel()
        super().handle_websocket_upgrade(event)

    def _watch(self) -> None:
        self._timer = self.loop.call_later(limits.ARRIVAL.most, self._look)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._last:
            self.transport.close()
        else:
            self._last = self.cycle
            self._watch()


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are those of the process, which stops this server, too."""
        yield


class HttpServer:
    """An HTTP server of `app`, listening on `address`. For port 0 the system chooses one; `port` is the result.

    `origins` are the web pages that may call it, `hosts` names of this machine besides localhost. `leaving` is called
    when it stops, to end streams that would go on. Raises InvalidInput
    for an origin that is none and an address that is malformed or may not be listened on with this `security`,
    Unavailable if it cannot be bound, and the errors of the files. Needs a running event loop.
    """

    def __init__(
        self,
        app: App,
        address: str,
        origins: Iterable[str] = (),
        hosts: Iterable[str] = (),
        security: Security = OPEN,
        leaving: Callable[[], None] = lambda: None,
    ) -> None:
        security.check(address)
        self._leaving = leaving
        tls = security.tls
        self._place = f"{'http' if tls is None else 'https'}://{split(address)[0]}"
        pages = Pages(app, origins, hosts)
        self._socket = _bind(address)
        self.port: int = self._socket.getsockname()[1]
        self._server = _Uvicorn(
            uvicorn.Config(
                pages,
                http=Connection,
                ws="websockets-sansio",
                ws_max_size=limits.MESSAGE.most,
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.CALLS.most,
                timeout_keep_alive=limits.ARRIVAL.most,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=limits.METADATA.most,
                ssl_context_factory=None if tls is None else lambda *_: Tls(tls).context(),
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it is, such as http://127.0.0.1:11434."""
        return f"{self._place}:{self.port}"

    async def start(self) -> str:
        """Accept requests. Returns a line that says where."""
        self._socket.listen(BACKLOG)
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        return f"HTTP on {self.url}"

    async def stop(self) -> None:
        """Close the port and all connections. The host has been closed before: no request runs any more."""
        self._leaving()
        self._server.should_exit = True
        if self._task is not None:
            await self._task


def _bind(address: str) -> socket.socket:
    host, port = split(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)  # asyncio sends small pieces at once on sockets that name TCP
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _keep_alive(bound)
            bound.bind(place)
        except OSError:
            bound.close()
            raise
    except OSError:
        raise Unavailable(
            f"cannot listen on {address}: the port is in use, or the address is not one of this machine's. Choose "
            "another with --http"
        ) from None
    return bound


def _keep_alive(listening: socket.socket) -> None:
    """Close connections, which inherit these options, whose client has vanished or reads nothing."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
