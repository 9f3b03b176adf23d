"""Clients of all kinds at a server with TLS and tokens. That of Node is in tests/serving/test_node_example.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

import enginecast
from tests.fakes.guarded import guarded
from tests.fakes.serving import FakeServer

Guarded = tuple[FakeServer, Path, str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Guarded]:
    with guarded(tmp_path) as found:
        yield found


def test_python(server: Guarded) -> None:
    fake, ca, token = server
    with enginecast.Client(fake.address, "draw", ca=ca, token=token) as client:
        assert client.generate("a circle", steps=1).image.shape == (8, 16, 3)
    with enginecast.Client(fake.address, "talk", ca=ca, token=token) as client:
        assert client.chat("what?").text == "a red círcle"


async def test_asyncio(server: Guarded) -> None:
    fake, ca, token = server
    with enginecast.Client(fake.address, "draw", ca=ca, token=token) as client:
        drawings = await asyncio.gather(*(client.generate_stream("a circle", steps=1) for _ in range(3)))
    assert [drawing.image.shape for drawing in drawings] == [(8, 16, 3)] * 3


def test_triton(server: Guarded) -> None:
    fake, ca, token = server
    headers = {"authorization": f"Bearer {token}"}
    with triton.InferenceServerClient(fake.address, ssl=True, root_certificates=str(ca)) as client:
        assert client.is_server_live() and client.is_server_ready(), "without a token"
        assert {model.name for model in client.get_model_repository_index(headers=headers).models} >= {"draw", "talk"}
        client.unload_model("talk", headers=headers)
        client.load_model("talk", headers=headers)
        with pytest.raises(InferenceServerException, match="a token is required"):
            client.unload_model("talk")
    assert fake.host.status("talk").target == "fake"
