"""Pictures that are fetched: from listed hosts, public or listed addresses, within limits, without redirects."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from runtime import limits
from runtime.errors import InvalidInput
from serving.dialects.http.fetching import Fetcher, Hosts
from tests.fakes.certificates import Authority

PICTURE = b"\x89PNG picture"


class Pictures(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["host"]))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("location", "https://127.0.0.1/picture")
            self.send_header("content-length", "0")
            self.end_headers()
        elif self.path == "/slow":
            time.sleep(3)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x" * 65536)
        elif self.path == "/chunks":
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"4\r\n\x89PNG\r\n8\r\n picture\r\n0\r\n\r\n")
        elif self.path == "/broken":
            self.wfile.write(b"HTTP/7 what\r\n\r\n")
        else:
            self.send_response(200)
            self.send_header("content-length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *_: Any) -> None: ...


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """The client has left."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def server(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quiet]:
    """A server on loopback whose certificate is trusted."""
    files = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    Pictures.seen = []
    made = Quiet(("127.0.0.1", 0), Pictures)
    made.socket = context.wrap_socket(made.socket, server_side=True)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    yield made
    made.shutdown()
    made.server_close()


def get(url: str, *hosts: str) -> bytes:
    async def fetched() -> bytes:
        async with Fetcher(Hosts(hosts)) as fetcher:
            return await fetcher.get(url, "url")

    return asyncio.run(fetched())


def test_a_listed_host(server: Quiet) -> None:
    port = server.server_address[1]
    both = (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}")
    assert get(f"https://localhost:{port}/picture?a=b#c", *both) == PICTURE
    assert get(f"https://LOCALHOST:{port}/chunks", *both) == PICTURE
    assert Pictures.seen == [("/picture?a=b", f"localhost:{port}"), ("/chunks", f"LOCALHOST:{port}")]


def test_an_address_that_is_not_public_must_be_listed(server: Quiet) -> None:
    port = server.server_address[1]
    with pytest.raises(InvalidInput, match="leads to an address that is not public"):
        get(f"https://localhost:{port}/picture", f"localhost:{port}")
    assert not Pictures.seen


@pytest.mark.parametrize(
    "path, why",
    [
        ("/redirect", "was answered with status 302, expected 200: redirects are not followed"),
        ("/endless", "has more than"),
        ("/slow", "did not arrive within 1 s"),
        ("/broken", "cannot be fetched"),
    ],
)
def test_answers_that_are_no_pictures(server: Quiet, path: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FETCH", limits.Limit("fetching", 1, "seconds", ""))
    limits.LIMITS.pop()
    port = server.server_address[1]
    with pytest.raises(InvalidInput, match=f"^url: {why}"):
        get(f"https://localhost:{port}{path}", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}")


def test_certificates_are_checked(server: Quiet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = server.server_address[1]
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path, "other").path))
    with pytest.raises(InvalidInput, match="SSLCertVerificationError"):
        get(f"https://localhost:{port}/picture", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}")
    assert not Pictures.seen


def test_pictures_of_a_request_have_the_bytes_of_a_message(server: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]

    async def twice() -> None:
        url = f"https://127.0.0.1:{port}/picture"
        async with Fetcher(Hosts([f"127.0.0.1:{port}"])) as fetcher:
            monkeypatch.setattr(fetcher, "_left", len(PICTURE) + 5)
            assert await fetcher.get(url, "url") == PICTURE
            with pytest.raises(InvalidInput, match="has more than 5 bytes"):
                await fetcher.get(url, "url")

    asyncio.run(twice())


def test_few_requests_fetch_at_once(server: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait until one of them has all its pictures."""
    port = server.server_address[1]
    hosts = Hosts([f"127.0.0.1:{port}"])
    hosts.turns = asyncio.Semaphore(1)

    async def both() -> None:
        url = f"https://127.0.0.1:{port}/picture"
        async with Fetcher(hosts) as first, Fetcher(hosts) as second:
            assert await first.get(url, "url") == PICTURE
            waiting = asyncio.ensure_future(second.get(url, "url"))
            assert await first.get(url, "url") == PICTURE
            assert not waiting.done()
            await first.__aexit__()
            assert await waiting == PICTURE
            first._deadline = None  # it has left already

    asyncio.run(both())


@pytest.mark.parametrize(
    "url, why",
    [
        ("https://other.example/x.png", "which this server does not fetch from"),
        ("https://images.example:8443/x.png", "which this server does not fetch from"),
        ("https://images.example.other/x.png", "which this server does not fetch from"),
        ("https://me:secret@images.example/x.png", "which this server does not fetch from"),
        ("https://images.example@other.example/x.png", "which this server does not fetch from"),
        ("http://images.example/x.png", "is no data: and no https: URL"),
        ("ftp://images.example/x.png", "is no data: and no https: URL"),
        ("https://images.example/x\r\nhost: other", "is no data: and no https: URL"),
        ("https://images.example/ä", "is no data: and no https: URL"),
        ("https://images.example:port/", "is no URL"),
        ("https://2130706433/x.png", "which this server does not fetch from"),
    ],
)
def test_urls_that_are_refused(url: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=f"^url: .*{why}"):
        get(url, "images.example")


@pytest.mark.parametrize(
    "address, allowed",
    [
        ("93.184.215.14", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%lo", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("10.0.0.5", True),
    ],
)
def test_addresses(address: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(["images.example", "10.0.0.5"])
    assert hosts.allowed(address, 443) is allowed
    connected: list[str] = []

    async def resolved(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port)) for found in ("93.184.215.14", address)]

    async def connect(host: str, *_: Any, **__: Any) -> Any:
        connected.append(host)
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolved)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(InvalidInput, match="cannot be fetched" if allowed else "not public"):
        get("https://images.example/x.png", "images.example", "10.0.0.5")
    assert connected == (["93.184.215.14", address] if allowed else [])


@pytest.mark.parametrize("host", ["", "https://images.example", "a/b", "a@b", "a:x", "a?b", "[::1"])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(InvalidInput, match=r"^fetch_hosts: .* is no host, expected a name or an address"):
        Hosts([host])
