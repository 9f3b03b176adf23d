"""What HTTP costs beside gRPC can be measured."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.fakes.serving import FakeServer
from tests.fakes.web import serve
from tests.serving.overhead import measure


def test_both_protocols_are_timed() -> None:
    found = measure({1: 2, 5: 1})
    assert all(seconds > 0 for by in found.values() for seconds in by.values()) and list(found) == ["gRPC", "HTTP"]


def test_pieces_are_sent_at_once(tmp_path: Path) -> None:
    """Otherwise the system holds each back for some 40 ms, until the client has confirmed the one before."""
    with FakeServer(tmp_path / "bundles") as fake:
        server = serve(fake)
        assert server._socket.proto == socket.IPPROTO_TCP
        fake.do(server.stop())
