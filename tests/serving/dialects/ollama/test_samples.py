"""Answers, pictures and vectors of real models to Ollama's own Python client are those of gRPC for the same seed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from ollama import Client, ResponseError

from runtime.vision.images import Picture, decode_image, encode_image
from tests.conftest import cast
from tests.fakes.samples import Samples, serving

DRAW, TALK = "shapes-diffusion", "shapes-vlm"
PROMPT = "a large red circle"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def samples(diffusion_bundle: Path, vlm_bundle: Path) -> Iterator[Samples]:
    with serving(diffusion_bundle, vlm_bundle) as server:
        yield server


@pytest.fixture(scope="module")
def client(samples: Samples) -> Iterator[Client]:
    with Client(samples.http) as made:
        yield made


@pytest.fixture(scope="module")
def picture(samples: Samples) -> Picture:
    with samples.client(DRAW) as session:
        return session.generate(PROMPT, steps=6, seed=3).image


def test_pictures(client: Client, picture: Picture) -> None:
    drawn = client.generate(DRAW, PROMPT, steps=6, options={"seed": 3})
    np.testing.assert_array_equal(decode_image(base64.b64decode(drawn.image or "")), picture)
    pieces = list(client.generate(f"{DRAW}:latest", PROMPT, steps=6, options={"seed": 3}, stream=True))
    assert [(piece.completed, piece.total) for piece in pieces[:-1]] == [(step, 6) for step in range(1, 7)]
    assert pieces[-1].image == drawn.image


def test_answers(client: Client, samples: Samples, picture: Picture) -> None:
    file, options = encode_image(picture), {"temperature": 0.8, "top_k": 20, "seed": 5, "num_predict": 24}
    question = "What is in the picture?"
    with samples.client(TALK) as session:
        expected = session.chat(question, [picture], temperature=0.8, top_k=20, seed=5, max_tokens=24)
    messages = [{"role": "user", "content": question, "images": [file]}]
    answer = client.chat(TALK, messages, options=options)
    assert answer.message.content == expected.text != ""
    assert answer.done_reason == expected.reason
    assert (answer.prompt_eval_count, answer.eval_count) == (expected.prompt_tokens, expected.completion_tokens)
    pieces = [piece.message.content or "" for piece in client.chat(TALK, messages, options=options, stream=True)]
    assert "".join(pieces) == expected.text and len(pieces) > 2
    assert client.generate(TALK, question, images=[file], options=options).response == expected.text


def test_answers_in_json(client: Client, picture: Picture) -> None:
    messages = [{"role": "user", "content": "Which colour has the shape?", "images": [encode_image(picture)]}]
    answer = client.chat(TALK, messages, format=SCHEMA, logprobs=True, options={"num_predict": 300})
    assert json.loads(answer.message.content or "")["colour"] in ("red", "green", "blue")
    assert "".join(one.token for one in answer.logprobs or ()) == answer.message.content


def test_what_is_known_of_them(client: Client) -> None:
    assert client.show(TALK).capabilities == ["completion", "vision"] and client.show(DRAW).capabilities == ["image"]
    parameters = client.show(TALK).parameters or ""
    assert "max_tokens" in parameters and "temperature" in parameters
    info = client.show(TALK).modelinfo or {}
    assert info[f"{info['general.architecture']}.context_length"] > 0
    assert all(model.size is not None and model.size > 100_000 for model in client.list().models)


def test_mistakes_name_the_fields_of_the_client(client: Client) -> None:
    question = [{"role": "user", "content": "x"}]
    for options, why in (
        ({"temperature": -1}, "options.temperature: is -1"),
        ({"top_p": 2}, "options.top_p: is 2"),
        ({"repeat_penalty": 0}, "options.repeat_penalty: is 0"),
        ({"num_predict": 100_000}, "options.num_predict: the prompt has"),
    ):
        with pytest.raises(ResponseError, match=f"^{why}"):
            client.chat(TALK, question, options=options)
    with pytest.raises(ResponseError, match=r"^format: .*uniqueItems"):
        client.chat(TALK, question, format={"type": "array", "uniqueItems": True})
    with pytest.raises(ResponseError, match=r"^width: is 3"):
        client.generate(DRAW, "x", width=3)


@pytest.mark.full
def test_vectors(tiny_clip: Path, bundles: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    with serving(cast(str(tiny_clip), bundles / "tiny-clip")) as server, Client(server.http) as client:
        name = client.list().models[0].model or ""
        with server.client(name.removesuffix(":latest")) as session:
            expected = session.embed(["a red fox", "x"], [picture])
        texts = client.embed(name, ["a red fox", "x"]).embeddings
        np.testing.assert_allclose(texts, unit(expected.texts), atol=1e-6)
        body = {"model": name, "images": [base64.b64encode(encode_image(picture)).decode()]}
        images = client._client.post("/api/embed", json=body).json()["embeddings"]
        np.testing.assert_allclose(images, unit(expected.images), atol=1e-6)
        assert client.show(name).capabilities == ["embedding", "vision"]


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths
