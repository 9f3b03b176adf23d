"""Embeddings and lists of models of the package openai, unchanged."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest

from serving.dialects.http.server import HttpServer
from tests.fakes.embedding import WIDTH, vector
from tests.fakes.proofs import proves
from tests.fakes.web import send

EMBED = "POST /v1/embeddings"


@proves(EMBED, "model", "input", "encoding_format")
def test_texts(client: openai.OpenAI) -> None:
    """The package asks for base64 by itself."""
    found = client.embeddings.create(model="match", input=["a", "ö"])
    assert [(one.index, one.object) for one in found.data] == [(0, "embedding"), (1, "embedding")]
    for one, text in zip(found.data, ("a", "ö"), strict=True):
        np.testing.assert_array_equal(np.float32(one.embedding), vector(text.encode()))
    floats = client.embeddings.create(model="match", input="a", encoding_format="float", user="me")
    assert floats.data[0].embedding == found.data[0].embedding and len(floats.data) == 1
    raw: Any = client.embeddings.create(model="match", input="a", encoding_format="base64").data[0].embedding
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), vector(b"a"))
    assert found.model == "match" and found.usage.total_tokens == 0


@proves(EMBED, "dimensions")
def test_dimensions(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="match", input="a", dimensions=WIDTH).data[0].embedding) == WIDTH
    with pytest.raises(openai.BadRequestError, match="have 4: send that or none") as caught:
        client.embeddings.create(model="match", input="a", dimensions=WIDTH - 1)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    "sent, field, why",
    [
        ([1, 2], "input", "holds tokens"),
        ([[1, 2]], "input", "holds tokens"),
        ([], "input", "is empty"),
        (["x", 3], "input[1]", "valid string"),
        (["x"] * 1001, "input", "at most 1,000"),
        ("x" * 100_001, "input", "at most 100,000"),
        (None, "input", "valid list"),
    ],
)
def test_what_is_refused_is_named(web: HttpServer, sent: Any, field: str, why: str) -> None:
    response, content = send(web, "/v1/embeddings", {"model": "match", "input": sent})
    assert response.status == 400 and content["error"]["param"] == field and why in content["error"]["message"]


@proves("GET /v1/models")
@proves("GET /v1/models/{name}")
def test_models(client: openai.OpenAI) -> None:
    found = list(client.models.list())
    assert [model.id for model in found] == ["draw", "match", "talk"]
    assert {(model.object, model.owned_by) for model in found} == {("model", "enginecast")}
    assert client.models.retrieve("draw") == found[0]
    with pytest.raises(openai.NotFoundError, match="did you mean 'draw'"):
        client.models.retrieve("drow")
