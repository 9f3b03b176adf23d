from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.host.offers import Limits
from tests.fakes.serving import FakeServer


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[FakeServer]:
    """A server whose models are not loaded, which runs one request at a time and lets two wait."""
    server = FakeServer(tmp_path, Limits(slots=1, max_queue=2, grace_seconds=5))
    yield server
    server.end()


@pytest.fixture
def warm(cold: FakeServer) -> FakeServer:
    """A server whose models are ready."""
    cold.load_all()
    return cold
