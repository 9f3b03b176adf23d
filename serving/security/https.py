"""TLS of servers that Python's own sockets make."""

from __future__ import annotations

import ssl
from socket import socket

from serving.security.tls import TlsFiles


class Tls:
    """Wraps new connections. Each uses the files as they are then. Raises the errors of reading them at first."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._watched = files.watched()
        self._used = self._watched.current()
        self._context = self._new()

    def wrap(self, connection: socket) -> ssl.SSLSocket:
        """The connection with TLS. The handshake is part of the first read."""
        return self._current().wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def context(self) -> ssl.SSLContext:
        """A context for servers that have one for all connections."""

        def renew(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
            connection.context = self._current()

        context = self._new()
        context.sni_callback = renew  # called for every handshake
        return context

    def _current(self) -> ssl.SSLContext:
        if (current := self._watched.current()) is not self._used:
            self._context, self._used = self._new(), current
        return self._context

    def _new(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self._files.client_ca)
        context.load_cert_chain(self._files.cert, self._files.key)
        if self._files.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context
