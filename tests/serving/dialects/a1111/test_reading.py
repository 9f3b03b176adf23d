"""What is read from pictures: their parameters, and what a chat model says of them."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from runtime.vision.images import encode_image
from tests.fakes.proofs import proves
from tests.serving.dialects.a1111.conftest import SHADES, Studio, b64

ASK = ["/sdapi/v1/vqa", "/sdapi/v1/caption"]


@proves("POST /sdapi/v1/png-info", "image")
def test_parameters_of_a_picture(studio: Studio) -> None:
    drawn = studio.api.txt2img(prompt="a circle", negative_prompt="blue", steps=3, seed=9)
    found = studio.api.png_info(drawn.image)
    assert found.info == drawn.info["infotexts"][0]
    read = found.parameters
    assert (read["Prompt"], read["Negative prompt"], read["Steps"], read["Seed"]) == ("a circle", "blue", "3", "9")
    assert (read["Size-1"], read["Size-2"], read["Sampler"]) == ("16", "8", "Euler a")
    nothing = studio.api.png_info(Image.fromarray(SHADES)).json
    assert nothing == {"info": "", "items": {}, "parameters": {}}


def test_other_texts_of_a_picture(studio: Studio) -> None:
    file = encode_image(SHADES, texts={"parameters": "a\nSteps: 1, Seed: 2, Size: 4x4", "Software": "x"})
    status, content = studio.post("/sdapi/v1/png-info", {"image": base64.b64encode(file).decode()})
    assert status == 200 and content["items"] == {"Software": "x"} and content["parameters"]["Size-1"] == "4"
    for image in ("", "?", "AAAA", "http://localhost/x"):
        status, content = studio.post("/sdapi/v1/png-info", {"image": image})
        assert status == 400 and content["detail"].startswith("image: is no")


@proves("POST /sdapi/v1/interrogate", "image", "model")
def test_a_caption_for_the_client_library(studio: Studio) -> None:
    assert studio.api.interrogate(Image.fromarray(SHADES)).info == "a red círcle"
    assert len(studio.requests[-1].messages) == 1 and len(studio.requests[-1].images) == 1
    assert studio.api.interrogate(Image.fromarray(SHADES), model="talk").info == "a red círcle"
    with pytest.raises(RuntimeError, match=r"model: .*deepdanbooru.* is not known"):
        studio.api.interrogate(Image.fromarray(SHADES), model="deepdanbooru")


@proves("GET /sdapi/v1/vqa/models")
@proves("POST /sdapi/v1/vqa", "image", "model", "question", "prompt", "system", "max_tokens", "temperature", "top_k")
@proves("POST /sdapi/v1/caption", "image", "model", "question", "prompt", "system", "max_tokens", "temperature")
@proves("POST /sdapi/v1/caption", "top_k", "top_p", "num_beams")
@proves("POST /sdapi/v1/vqa", "top_p", "num_beams")
@pytest.mark.parametrize("path", ASK)
def test_questions(studio: Studio, path: str) -> None:
    body = {"image": b64(SHADES), "model": "talk", "question": "what is it?", "system": "be brief", "max_tokens": 2}
    status, content = studio.post(path, {**body, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "num_beams": 1})
    assert status == 200 and content["answer"] == "a red"
    asked = studio.requests[-1]
    system, user = asked.messages
    assert system.content == ("be brief",) and user.content[1] == "what is it?"
    assert np.array_equal(user.content[0].decode(), SHADES)
    values = (asked.max_tokens, asked.temperature, asked.top_k, asked.top_p, asked.beams)
    assert values == (2, 0.5, 3, 0.9, 1)
    own = {"image": b64(SHADES), "question": "Use Prompt", "prompt": "how many?"}
    assert studio.post(path, own)[0] == 200 and studio.requests[-1].messages[0].content[1] == "how many?"
    assert studio.post(path, {**own, "question": "what?"})[1]["detail"].startswith("prompt: comes with a question")
    assert studio.post(path, {**own, "image": "?"})[1]["detail"].startswith("image: is no base64")
    assert studio.post(path, {**own, "backend": "tagger"})[1]["detail"].startswith("backend: pictures are described by")
    assert studio.post(path, {**own, "max_tokens": 0})[0] == 400
    assert [one["name"] for one in studio.api.custom_get("sdapi/v1/vqa/models")] == ["talk"]
