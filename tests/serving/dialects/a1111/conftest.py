"""A fake server with the client library `webuiapi` connected to it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from webuiapi import WebUIApi

from runtime.vision.images import Picture, encode_image
from serving.dialects.http.server import HttpServer
from tests.fakes.serving import FakeModel, FakeServer, note_requests, until
from tests.fakes.web import send, serve

DRAW = ["/sdapi/v1/txt2img", "/sdapi/v1/img2img"]


@dataclass
class Studio:
    """A server, a client of it, and the requests that its models got."""

    fake: FakeServer
    server: HttpServer
    api: Any
    requests: list[Any] = field(default_factory=list)

    def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """A status and the JSON of a response."""
        response, content = send(self.server, path, body, **headers)
        return response.status, content

    def draw(self, path: str, **fields: Any) -> Any:
        """The request that the model gets."""
        picture = {"init_images": [b64(SHADES)]} if "img2img" in path else {}
        status, content = self.post(path, {"steps": 1, **picture, **fields})
        assert status == 200, content
        return self.requests[-1]

    def refused(self, path: str, **fields: Any) -> str:
        """Why a request is refused."""
        picture = {"init_images": [b64(SHADES)]} if "img2img" in path else {}
        status, content = self.post(path, {**picture, **fields})
        assert 400 <= status < 500 and content["error"], (status, content)
        return str(content["detail"])


SHADES: Picture = np.linspace(0, 255, 32 * 48 * 3).astype(np.uint8).reshape(32, 48, 3)
"""A picture of 48x32 pixels."""


def b64(picture: Picture) -> str:
    return base64.b64encode(encode_image(picture)).decode()


@contextmanager
def opened(fake: FakeServer) -> Iterator[Studio]:
    """A fake server with HTTP, and the requests that all its models get."""
    with fake:
        server = serve(fake)
        found = Studio(fake, server, None)
        for model in fake.models.values():
            note_requests(model, found.requests)
        yield found
        fake.do(server.stop())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with opened(FakeServer(tmp_path_factory.mktemp("fake") / "bundles", ready=True)) as found:
        yield found


@pytest.fixture
def studio(served: Studio) -> Iterator[Studio]:
    """The server of the file, with a new client."""
    served.api = WebUIApi(port=served.server.port)
    served.requests.clear()
    yield served
    served.fake.draw.release()
    until(lambda: served.fake.busy() == 0)
    served.fake.draw.failure, served.fake.draw.picture = None, FakeModel.picture
    served.fake.draw.engine.calls.clear()
