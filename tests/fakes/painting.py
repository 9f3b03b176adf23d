"""A fake diffusion model whose pictures tell requests apart, and a server with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runtime.pipeline import Call, Pipeline, Progress
from runtime.scripting import Scripts
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture
from serving.dialects.grpc.tasks.image import image_message
from tests.fakes.serving import FakeModel, FakeServer


def painted(request: ImageRequest, index: int = 0) -> Picture:
    """The picture number `index` of a request: noise of its message, which has the seed of the picture."""
    message = image_message("", request)
    message.ClearField("images")
    message.seed = (request.seed or 0) + index
    seed = hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
    size = request.height or 8, request.width or 16, 3
    return np.random.default_rng(list(seed)).integers(0, 256, size).astype(np.uint8)


class Painter(FakeModel):
    """Draws `painted` pictures; `requests` are those that it has begun to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[ImageRequest] = []

    def _draw(self, steps: int, request: Any) -> Pipeline:
        self.requests.append(request)
        for index in range(request.images):
            for step in range(1, steps + 1):
                yield Call("denoiser", {})
                yield Progress(index * steps + step, request.images * steps)
            yield ImageReady(painted(request, index), index, (request.seed or 0) + index)


@contextmanager
def painting(folder: Path, scripts: Scripts | None = None) -> Iterator[tuple[FakeServer, Painter]]:
    """A server whose model "draw" is a painter."""
    folder.mkdir(exist_ok=True)
    with FakeServer(folder, scripts=scripts) as server:
        server.models["draw"] = painter = Painter()
        yield server, painter
