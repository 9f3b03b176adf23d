"""A fake server with the clients of the package openai."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from serving.dialects.http.server import HttpServer
from tests.fakes.embedding import EmbeddingServer
from tests.fakes.serving import FakeServer
from tests.fakes.web import serve


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with EmbeddingServer(tmp_path_factory.mktemp("fake") / "bundles", ready=True) as server:
        yield server


@pytest.fixture
def fake(served: FakeServer) -> Iterator[FakeServer]:
    """The server of all tests of a file, whose models are as they were after each."""
    yield served
    for model in served.models.values():
        model.release()
        model.failure = None
        model.engine.calls.clear()


@pytest.fixture(scope="module")
def web(served: FakeServer) -> Iterator[HttpServer]:
    server = serve(served)
    yield server
    served.do(server.stop())


@pytest.fixture(scope="module")
def client(web: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key="none", max_retries=0) as made:
        yield made
