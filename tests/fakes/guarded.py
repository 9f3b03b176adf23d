"""A fake server with TLS and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.dialects.grpc.connection import Connection
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from serving.security.tokens import new
from tests.fakes.certificates import Authority
from tests.fakes.serving import FakeServer


@contextmanager
def guarded(folder: Path) -> Iterator[tuple[FakeServer, Path, str]]:
    """A server whose models are ready, the authority of its certificate, and a token with every scope."""
    authority, file = Authority(folder), folder / "tokens.toml"
    token = new(file, "all", frozenset(Scope), None, None)
    security = Security(authority.issue("server"), gate=Gate(file))
    (folder / "bundles").mkdir()
    connection = Connection(authority.path, token=token)
    with FakeServer(folder / "bundles", ready=True, security=security, connection=connection) as server:
        yield server, authority.path, token
