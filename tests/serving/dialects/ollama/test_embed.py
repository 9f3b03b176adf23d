"""Vectors with Ollama's own Python client, unchanged."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ollama import ResponseError

from runtime.pipeline import Call, Pipeline
from runtime.tasks.embed import Embeddings, EmbedRequest
from runtime.vision.images import encode_image
from serving.host.offers import Limits, Offer
from serving.host.served import Served as Model
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeModel, bundle, note_requests
from tests.serving.dialects.ollama.conftest import Served

PICTURE = encode_image(np.full((4, 6, 3), 200, np.uint8))


class FakeVectors(FakeModel):
    """Embeds a text as its length, 4 and 0, a picture as 0, 3 and 4; with `several`, as two vectors."""

    task = EmbedRequest.task
    several = False

    def pipeline(self, request: Any) -> Pipeline:
        return self._embed(request)

    def _embed(self, request: EmbedRequest) -> Pipeline:
        yield Call("denoiser", {})
        texts = np.array([[len(text), 4, 0] for text in request.texts], np.float32).reshape(-1, 3)
        images = np.array([[0, 3, 4]] * len(request.images), np.float32).reshape(-1, 3)
        tokens = sum(map(len, request.texts))
        yield Embeddings(texts, np.stack([images, images], 1) if self.several else images, tokens)


@pytest.fixture(scope="module")
def vectors(lasting: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeVectors]:
    """The model "match"."""
    offered = bundle(tmp_path_factory.mktemp("bundles"), "match", EmbedRequest.task)
    model = lasting.fake.models["match"] = FakeVectors()
    note_requests(model, lasting.requests)

    async def add() -> None:
        host = lasting.fake.host
        host.catalog.add(Model(Offer("match", Path(offered.root), offered), Limits(), host.observer))

    lasting.fake.do(add())
    yield model


@proves("POST /api/embed", "model", "input", "keep_alive", "options")
def test_texts(served: Served, vectors: FakeVectors) -> None:
    found = served.client.embed("match", ["abc", "abcdefgh"], keep_alive="5m", options={"num_ctx": 512})
    assert np.allclose(found.embeddings, [[0.6, 0.8, 0], [8 / 80**0.5, 4 / 80**0.5, 0]], atol=1e-6)
    assert found.model == "match" and found.prompt_eval_count == 11
    assert found.total_duration is not None and found.load_duration is not None
    assert found.total_duration >= found.load_duration >= 0
    assert np.allclose(served.client.embed("match:latest", "abc").embeddings, [[0.6, 0.8, 0]], atol=1e-6)
    assert [request.texts for request in served.requests] == [("abc", "abcdefgh"), ("abc",)]


@proves("POST /api/embed", "images", "dimensions")
def test_pictures_and_fewer_dimensions(served: Served, vectors: FakeVectors) -> None:
    body = {"model": "match", "input": "abc", "images": [base64.b64encode(PICTURE).decode()]}
    assert np.allclose(served.post("/api/embed", body)[1]["embeddings"], [[0.6, 0.8, 0], [0, 0.6, 0.8]], atol=1e-6)
    body = {"model": "match", "images": body["images"]}
    assert np.allclose(served.post("/api/embed", body)[1]["embeddings"], [[0, 0.6, 0.8]], atol=1e-6)
    assert served.requests[1].images[0].data == PICTURE
    assert np.allclose(served.client.embed("match", "abc", dimensions=1).embeddings, [[1.0]])
    vectors.several = True
    status, content = served.post("/api/embed", body)
    vectors.several = False
    assert status == 400 and content["error"].startswith("images: have several vectors each in this model")


@proves("POST /api/embeddings", "model", "prompt", "keep_alive", "options")
def test_the_form_of_before(served: Served, vectors: FakeVectors) -> None:
    assert served.client.embeddings("match", "abc", keep_alive=60, options={"num_thread": 1}).embedding == [3, 4, 0]


def test_mistakes(served: Served, vectors: FakeVectors) -> None:
    for body, why in (
        ({}, "input: is empty, and so is images"),
        ({"input": []}, "input: is empty"),
        ({"input": ["\ud800"]}, "input: holds half a surrogate"),
        ({"input": 5}, "input: input should be a valid list"),
        ({"input": "x", "images": ["!"]}, "images[0]: is no base64"),
        ({"input": "x", "dimensions": 0}, "dimensions: input should be greater than or equal to 1"),
        ({"input": "x", "truncate": True}, "truncate: a text that is too long is refused"),
        ({"input": "x", "options": {"temperature": 1}}, "options.temperature: is not known here"),
        ({"input": "x", "model": "talk"}, "model: talk has the task chat"),
    ):
        status, content = served.post("/api/embed", {"model": "match", **body})
        assert status == 400 and content["error"].startswith(why), content
    with pytest.raises(ResponseError, match="prompt: has 1,000,001"):
        served.client.embeddings("match", "x" * 1_000_001)
    assert served.client.embed("match", "x", options={"num_ctx": 5, "num_gpu": 1}).embeddings
