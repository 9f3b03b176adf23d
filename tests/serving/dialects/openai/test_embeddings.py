"""Embeddings and lists of models of the package openai, unchanged."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from runtime.vision.images import encode_image
from serving.dialects.http.server import HttpServer
from tests.fakes.embedding import WIDTH, vector
from tests.fakes.proofs import proves
from tests.fakes.web import send

EMBED = "POST /v1/embeddings"
PICTURE = np.full((2, 3, 3), 90, np.uint8)


def unit(found: NDArray[np.float32]) -> NDArray[np.float32]:
    return found / np.linalg.norm(found)


@proves(EMBED, "model", "input", "encoding_format")
def test_texts(client: openai.OpenAI) -> None:
    """The package asks for base64 by itself."""
    found = client.embeddings.create(model="match", input=["a", "ö"])
    assert [(one.index, one.object) for one in found.data] == [(0, "embedding"), (1, "embedding")]
    for one, text in zip(found.data, ("a", "ö"), strict=True):
        np.testing.assert_allclose(one.embedding, unit(vector(text.encode())), rtol=1e-6)
        assert np.isclose(np.linalg.norm(one.embedding), 1)
    floats = client.embeddings.create(model="match", input="a", encoding_format="float", user="me")
    assert floats.data[0].embedding == found.data[0].embedding and len(floats.data) == 1
    raw: Any = client.embeddings.create(model="match", input="a", encoding_format="base64").data[0].embedding
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), np.float32(found.data[0].embedding))
    assert found.model == "match" and (found.usage.prompt_tokens, found.usage.total_tokens) == (2, 2)
    assert found.usage.model_extra == {}


@proves(EMBED, "dimensions")
def test_dimensions(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="match", input="a", dimensions=WIDTH).data[0].embedding) == WIDTH
    (cut,) = client.embeddings.create(model="match", input="a", dimensions=WIDTH - 1).data
    np.testing.assert_allclose(cut.embedding, unit(vector(b"a")[: WIDTH - 1]), rtol=1e-6)
    for wrong in (WIDTH + 1, 0, -1):
        with pytest.raises(openai.BadRequestError, match="have 4: send 1 to 4, or none") as caught:
            client.embeddings.create(model="match", input="a", dimensions=wrong)
        assert caught.value.param == "dimensions"


@proves(EMBED, "input[].text", "input[].image")
def test_pictures_among_texts(client: openai.OpenAI) -> None:
    file = base64.b64encode(encode_image(PICTURE)).decode()
    mixed: Any = ["a", {"image": f"data:image/png;base64,{file}"}, {"text": "b"}]
    found = client.embeddings.create(model="match", input=mixed)
    for one, content in zip(found.data, (b"a", PICTURE.tobytes(), b"b"), strict=True):
        np.testing.assert_allclose(one.embedding, unit(vector(content)), rtol=1e-6)
    assert [one.index for one in found.data] == [0, 1, 2]
    assert found.usage.total_tokens == 2 and found.usage.model_extra == {"image_pixels": 6}


@proves(EMBED, "messages", "messages[].role", "messages[].content", "messages[].content[].type")
@proves(EMBED, "messages[].content[].text", "messages[].content[].image_url", "messages[].content[].image_url.url")
def test_a_picture_or_a_text_as_a_message(web: HttpServer) -> None:
    url = f"data:image/png;base64,{base64.b64encode(encode_image(PICTURE)).decode()}"
    shown: Any = {"type": "image_url", "image_url": {"url": url}}
    for content, expected, usage in (
        ([shown], PICTURE.tobytes(), {"prompt_tokens": 0, "total_tokens": 0, "image_pixels": 6}),
        ([{"type": "text", "text": "abc"}], b"abc", {"prompt_tokens": 3, "total_tokens": 3}),
    ):
        sent = {"model": "match", "messages": [{"role": "user", "content": content}], "encoding_format": "float"}
        response, found = send(web, "/v1/embeddings", sent)
        assert response.status == 200, found
        (one,) = found["data"]
        np.testing.assert_allclose(one["embedding"], unit(vector(expected)), rtol=1e-6)
        assert found["usage"] == usage
    for body, field, why in (
        ({"messages": [{"role": "user", "content": [shown, shown]}]}, "messages", "have 2 parts"),
        ({"messages": [{"role": "user", "content": "x"}], "input": "x"}, "messages", "and input exclude each other"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "messages", "at most 1 item"),
        ({"input": [{"image": "x", "text": "y"}]}, "input[0]", "is a text or an image"),
        ({"input": ["x", {}]}, "input[1]", "is a text or an image"),
        ({"input": ["x", {"image": "/etc/passwd"}]}, "input[1].image", "is no data: and no https: URL"),
        ({"input": ["x", {"image": "data:image/png;base64,QUJD"}]}, "input[1].image", "is no PNG"),
        ({"input": [{"image": url}] * 33}, "input", "at most 32"),
    ):
        response, found = send(web, "/v1/embeddings", {"model": "match", **body})
        assert response.status == 400 and found["error"]["param"] == field, found
        assert why in found["error"]["message"], found


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
