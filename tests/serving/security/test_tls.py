"""TLS and mutual TLS over real gRPC, with certificates that change, expire and do not fit."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from typer.testing import CliRunner

import enginecast
from runtime.errors import InvalidInput, NotFound, Unavailable
from serving.cli import commands as cli
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.server import OPTIONS
from serving.security.addresses import check_listening, is_loopback
from serving.security.protection import Security
from serving.security.tls import TlsFiles
from tests.fakes.certificates import Authority
from tests.fakes.serving import FakeServer

Serve = Callable[[TlsFiles], FakeServer]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def serve(tmp_path: Path, authority: Authority) -> Iterator[Serve]:
    """Starts servers, whose clients trust the authority."""
    servers = []

    def start(files: TlsFiles) -> FakeServer:
        folder = tmp_path / f"bundles{len(servers)}"
        folder.mkdir()
        servers.append(FakeServer(folder, security=Security(files), connection=Connection(authority.path, attempts=1)))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


def shown(server: FakeServer) -> str:
    """The certificate that a new connection gets."""
    host, port = server.address.split(":")
    return ssl.get_server_certificate((host, int(port))).strip()


def test_a_client_that_trusts_the_authority(serve: Serve, authority: Authority) -> None:
    server = serve(authority.issue("server"))
    with enginecast.Client(server.address, ca=authority.path) as client:
        assert [model.name for model in client.models()] == ["draw", "talk"]


def test_clients_that_do_not_fit(
    serve: Serve, authority: Authority, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve(authority.issue("server"))
    with (
        enginecast.Client(server.address, attempts=1) as client,
        pytest.raises(Unavailable, match="requires TLS"),
    ):
        client.models()
    other = Authority(tmp_path, "other").path
    for options in ({"ca": other}, {"tls": True}):
        client = enginecast.Client(server.address, attempts=1, **options)  # type: ignore[arg-type]
        with client, pytest.raises(Unavailable, match="could not be trusted"):
            client.models()
    assert capfd.readouterr().err == "", "failed handshakes do not fill the log"


def test_an_expired_certificate_is_refused_by_clients(serve: Serve, authority: Authority, monkeypatch: Any) -> None:
    monkeypatch.setattr("serving.security.tls._check_time", lambda *_: None)  # it expired while the server ran
    server = serve(authority.issue("server", days=-1))
    with pytest.raises(Unavailable, match=r"has not expired .*certificate has expired"):
        server.client.models()


def test_mutual_tls(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("server")
    server = serve(TlsFiles(files.cert, files.key, authority.path))
    own, foreign = authority.issue("me"), Authority(tmp_path, "other").issue("you")
    with enginecast.Client(server.address, ca=authority.path, cert=own.cert, key=own.key) as client:
        assert len(client.models()) == 2
    with pytest.raises(Unavailable):
        server.client.models()
    with (
        enginecast.Client(server.address, ca=authority.path, cert=foreign.cert, key=foreign.key, attempts=1) as client,
        pytest.raises(Unavailable),
    ):
        client.models()


def test_certificates_change_without_a_restart(
    serve: Serve, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.issue("server")
    server = serve(files)
    first = shown(server)
    assert first == files.cert.read_text().strip() and len(server.client.models()) == 2
    authority.issue("server")
    second = files.cert.read_text().strip()
    assert shown(server) == second != first
    assert len(server.client.models()) == 2, "the connection before goes on"
    for break_it in (
        lambda: files.cert.write_text("nothing"),
        lambda: authority.issue("server", days=-1),
        files.key.unlink,
    ):
        caplog.clear()
        break_it()
        assert shown(server) == second
        assert [record.levelname for record in caplog.records] == ["ERROR"], "once, not with every connection"
        assert shown(server) == second and len(caplog.records) == 1
    authority.issue("server")
    assert shown(server) == files.cert.read_text().strip() != second


def test_files_that_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    files, other = authority.issue("server"), authority.issue("other")
    encrypted = tmp_path / "encrypted.key"
    secret = ec.generate_private_key(ec.SECP256R1())
    encrypted.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    (tmp_path / "empty").write_bytes(b"")
    expired, early = authority.issue("expired", days=-1), authority.issue("early", begins=1)
    for wrong, message in (
        (TlsFiles(files.cert, other.key), "is not the key of the certificate"),
        (TlsFiles(files.cert, encrypted), "is encrypted: give the key decrypted"),
        (TlsFiles(files.cert, files.cert), "has no readable key"),
        (TlsFiles(files.key, files.key), "has no readable certificate"),
        (TlsFiles(tmp_path / "empty", files.key), "has no readable certificate"),
        (TlsFiles(files.cert, files.key, files.key), "^tls_client_ca: .*has no readable certificate"),
        (expired, r"expired on \d{4}-\d\d-\d\d .* renew it"),
        (early, r"is valid from \d{4}-\d\d-\d\d .* on"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Security(wrong).check("127.0.0.1:0")
    with pytest.raises(NotFound):
        Security(TlsFiles(tmp_path / "nothing", files.key)).check("127.0.0.1:0")
    with pytest.raises(InvalidInput, match="belong together"):
        TlsFiles.of(files.cert, None, None)
    with pytest.raises(InvalidInput, match="belong together"):
        TlsFiles.of(None, None, authority.path)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.1:1", False),
        ("localhost.example.com:1", False),
        ("127.0.0.1.example.com:1", False),
    ],
)
def test_addresses(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
    check_listening(address, tls=True, insecure=False)
    check_listening(address, tls=False, insecure=True)
    if loopback:
        check_listening(address, tls=False, insecure=False)
    else:
        with pytest.raises(InvalidInput, match="--insecure"):
            check_listening(address, tls=False, insecure=False)


def test_a_connection_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="unencrypted"):
        enginecast.Client("example.com:1", token="secret")
    enginecast.Client("example.com:1", token="secret", tls=True).close()
    for wrong in ({"attempts": 0}, {"attempts": 6}, {"backoff": 0.0}, {"backoff": float("nan")}, {"cert": tmp_path},
        {"token": "a\nb"}, {"token": ""}, {"token": "ü"}):  # fmt: skip
        with pytest.raises(InvalidInput, match=f"^{next(iter(wrong))}: "):
            enginecast.Client("127.0.0.1:1", **wrong)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        enginecast.Client("127.0.0.1:1", ca=tmp_path / "nothing")


def test_commands_connect_with_tls(serve: Serve, authority: Authority) -> None:
    files, own = authority.issue("server"), authority.issue("me")
    server = serve(TlsFiles(files.cert, files.key, authority.path))
    server.do(server.host.load("talk"))
    given = ["--ca", str(authority.path), "--cert", str(own.cert), "--key", str(own.key)]
    asked = ["chat", "--address", server.address, "--model", "talk", "--prompt", "what?"]
    ended = CliRunner().invoke(cli.app, [*asked, *given])
    assert ended.exit_code == 0 and "a red c" in ended.stdout, ended.output
    environment = dict(zip(("ENGINECAST_CA", "ENGINECAST_CERT", "ENGINECAST_KEY"), given[1::2], strict=True))
    assert CliRunner().invoke(cli.app, asked, env=environment).exit_code == 0
    listed = CliRunner().invoke(cli.app, ["devices", "--address", server.address, "--json", *given])
    assert listed.exit_code == 0 and '"models"' in listed.stdout, listed.output


def test_a_connection_without_a_handshake_is_closed(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    soon = {"grpc.server_handshake_timeout_ms": 200}
    with FakeServer(tmp_path / "bundles", options=soon, security=Security(authority.issue("server"))) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as silent:
            assert silent.recv(1) == b""
    assert OPTIONS["grpc.server_handshake_timeout_ms"] == 30_000
