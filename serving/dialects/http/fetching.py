"""Fetches pictures that requests name by an https: URL, from hosts that the server's user has listed, and no others.

A name is resolved once, and the connection goes to the address that was checked: a name that is resolved again could
lead elsewhere. Addresses that are not public, such as those of this machine and its network, are refused unless they
are listed themselves. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from functools import cached_property
from typing import Final
from urllib.parse import SplitResult, urlsplit

import h11

from runtime import limits
from runtime.errors import InvalidInput, quoted

HTTPS: Final = "https"
PORT: Final = 443
NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""
PIECE: Final = 1 << 16
SETTING: Final = "fetch_hosts"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
    """The hosts that pictures may be fetched from: names and addresses, each with a port or with that of https. Raises
    InvalidInput for one that is malformed.
    """

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._known = frozenset(map(_host, hosts))
        self.turns = asyncio.Semaphore(limits.FETCHERS.most)

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Whose certificates are trusted: those of the system, or of SSL_CERT_FILE."""
        return ssl.create_default_context()

    def place(self, url: str, field: str) -> tuple[SplitResult, str, int]:
        """A URL's parts, host and port. Raises InvalidInput naming `field` if it may not be fetched."""
        limits.URL.length(field, url)
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or PORT
        except ValueError:
            raise InvalidInput(field, "is no URL: send a picture as data:image/png;base64,...") from None
        if parts.scheme != HTTPS or not url.isascii() or not url.isprintable() or " " in url:
            raise InvalidInput(field, "is no data: and no https: URL: send a picture as data:image/png;base64,...")
        if not self._known:
            raise InvalidInput(
                field, "is an https: URL, and this server fetches none: send the picture as data:image/png;base64,..., "
                "or start the server with --fetch-hosts"
            )  # fmt: skip
        if (host, port) not in self._known or "@" in parts.netloc:
            raise InvalidInput(
                field, f"is of {quoted(parts.netloc)}, which this server does not fetch from: send the picture as "
                "data:image/png;base64,..., or start the server with --fetch-hosts and that host"
            )  # fmt: skip
        return parts, host, port

    def allowed(self, address: str, port: int) -> bool:
        """Whether a connection may go to an address that a listed name leads to."""
        return (address, port) in self._known or _public(ipaddress.ip_address(address))


def _host(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and not (parts.path or parts.query or parts.fragment or "@" in text):
            return parts.hostname.lower(), parts.port or PORT
    except ValueError:
        pass
    raise InvalidInput(SETTING, f"{quoted(text)} is no host, expected a name or an address, such as images.example.org")


def _public(address: Address) -> bool:
    """Whether an address is one of the internet, also by the IPv4 address that it stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return _public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None:
            return _public(inner)
    return address.is_global and not address.is_multicast


class Fetcher:
    """Fetches the pictures of one request in an `async with` block. Together they have the bytes of a message and the
    time of `limits.FETCH` at most; few requests fetch at once.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._left = limits.MESSAGE.most
        self._deadline: float | None = None

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._deadline is not None:
            self._hosts.turns.release()

    async def get(self, url: str, field: str) -> bytes:
        """The content at a URL. Raises InvalidInput naming `field`."""
        parts, host, port = self._hosts.place(url, field)
        if self._deadline is None:
            await self._hosts.turns.acquire()
            self._deadline = asyncio.get_running_loop().time() + limits.FETCH.most
        try:
            async with asyncio.timeout_at(self._deadline):
                reader, writer = await self._connected(host, port, field)
                try:
                    content = await self._content(parts, reader, writer, field)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            raise InvalidInput(field, f"did not arrive within {limits.FETCH.most} s: send the picture itself") from None
        except (OSError, h11.ProtocolError) as error:
            kind = type(error).__name__
            raise InvalidInput(field, f"cannot be fetched ({kind}): check it, or send the picture itself") from None
        self._left -= len(content)
        return content

    async def _connected(self, host: str, port: int, field: str) -> Streams:
        """A connection to the first address of a name that answers. Every address must be allowed."""
        loop = asyncio.get_running_loop()
        found = [str(place[4][0]) for place in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(self._hosts.allowed(address, port) for address in found):
            raise InvalidInput(
                field, f"is of {quoted(host)}, which leads to an address that is not public: start the server with "
                "--fetch-hosts and that address to allow it"
            )  # fmt: skip
        failed = OSError()
        for address in found:
            try:
                return await asyncio.open_connection(address, port, ssl=self._hosts.tls, server_hostname=host)
            except OSError as error:
                failed = error
        raise failed

    async def _content(
        self, parts: SplitResult, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, field: str
    ) -> bytes:
        """What is at a URL."""
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = [("host", parts.netloc), ("accept", "image/*"), ("user-agent", "enginecast"), ("connection", "close")]
        request = h11.Request(method="GET", target=target, headers=headers)
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        return await self._body(connection, reader, field)

    async def _body(self, connection: h11.Connection, reader: asyncio.StreamReader, field: str) -> bytes:
        """The body of a response. Raises InvalidInput for another status than 200, and for one that is too large."""
        most, content = min(limits.PICTURE_BYTES.most, self._left), bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(PIECE))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise InvalidInput(
                    field, f"was answered with status {event.status_code}, expected 200: redirects are not followed"
                )
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > most:
                    raise InvalidInput(field, f"has more than {most:,} bytes: send a smaller picture")
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return bytes(content)
