"""A fake model of embeddings, and a server with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.pipeline import Call, Pipeline
from runtime.tasks.embed import Embeddings, EmbedRequest
from runtime.vision.images import decoded
from tests.fakes.serving import FakeModel, FakeServer

WIDTH = 4


def vector(content: bytes) -> NDArray[np.float32]:
    """The vector of a text or of a picture's pixels: numbers of its hash."""
    return np.frombuffer(hashlib.sha256(content).digest()[:WIDTH], np.uint8).astype(np.float32) / 7


class FakeVectors(FakeModel):
    """Embeds texts and pictures as `vector` says. Each character is a token."""

    task = EmbedRequest.task

    def pipeline(self, request: Any) -> Pipeline:
        yield Call("denoiser", {})
        texts = [vector(text.encode()) for text in request.texts]
        images = [vector(decoded(image).tobytes()) for image in request.images]
        empty = np.empty((0, WIDTH), np.float32)
        tokens = sum(len(text) for text in request.texts)
        yield Embeddings(np.stack(texts) if texts else empty, np.stack(images) if images else empty, tokens)


class EmbeddingServer(FakeServer):
    """A fake server with a model "match" for embeddings besides."""

    kinds: ClassVar[Mapping[str, type[FakeModel]]] = {**FakeServer.kinds, "match": FakeVectors}
