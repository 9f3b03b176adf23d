from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from enginecast import Client, Session
from enginecast.testing import FakeModel, fake_model
from tests.fakes.serving import FakeServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "bundles").mkdir()
    with FakeServer(tmp_path / "bundles", ready=True) as server:
        yield server


@pytest.fixture(params=["model", "client"])
def way(request: pytest.FixtureRequest) -> str:
    """Tests that take this run for a loaded bundle and for a client alike."""
    return str(request.param)


@pytest.fixture
def drawing(way: str, server: FakeServer) -> Iterator[tuple[Session, FakeModel]]:
    """Something that draws, and the fake behind it."""
    session = fake_model(server.draw) if way == "model" else Client(server.address, "draw")
    yield session, server.draw
    server.draw.release()
    session.close()


@pytest.fixture
def talking(way: str, server: FakeServer) -> Iterator[tuple[Session, FakeModel]]:
    """Something that answers, and the fake behind it."""
    fake = server.models["talk"]
    session = fake_model(fake) if way == "model" else Client(server.address, "talk")
    yield session, fake
    fake.release()
    session.close()
