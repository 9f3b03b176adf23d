"""Prompts and pictures with Ollama's own Python client, unchanged."""

from __future__ import annotations

import base64
import http.client
from typing import Any

import numpy as np
import pytest
from ollama import ResponseError

from runtime.language.grammar import Grammar
from runtime.vision.images import decode_image, encode_image
from serving.host.states import ModelState
from tests.fakes.proofs import proves
from tests.serving.dialects.ollama.conftest import Served

PICTURE = encode_image(np.full((16, 24, 3), 200, np.uint8))


@proves("POST /api/generate", "model", "prompt", "system", "images", "stream", "truncate")
def test_a_prompt(served: Served) -> None:
    answer = served.client.generate("talk", "What is it?", system="Be short.", images=[PICTURE])
    assert (answer.response, answer.done, answer.done_reason) == ("a red círcle", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count, answer.image) == (7, 3, None)
    (request,) = served.requests
    assert [turn.role for turn in request.messages] == ["system", "user"]
    assert request.images[0].data == PICTURE and request.context_overflow == "slide"
    pieces = list(served.client.generate("talk", "What is it?", stream=True))
    assert [piece.response for piece in pieces] == ["a ", "red ", "círcle", ""]
    assert served.post("/api/generate", {"model": "talk", "prompt": "x", "truncate": False})[0] == 200
    assert served.requests[-1].context_overflow == "refuse"


@proves(
    "POST /api/generate",
    "options",
    "options.temperature",
    "options.top_k",
    "options.top_p",
    "options.min_p",
    "options.repeat_penalty",
    "options.presence_penalty",
    "options.frequency_penalty",
    "options.num_predict",
    "options.stop",
    "options.seed",
    "format",
    "logprobs",
    "top_logprobs",
)
def test_options_of_answers(served: Served) -> None:
    options: dict[str, Any] = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.2, "num_predict": 2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "stop": ["x"], "seed": 5,
    }  # fmt: skip
    answer = served.client.generate("talk", "x", options=options, format="json", logprobs=True, top_logprobs=1)
    (request,) = served.requests
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 7, 0.9, 0.1)
    assert (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) == (1.2, 0.3, -0.4)
    assert (request.max_tokens, request.stop, request.seed, request.grammar) == (2, ("x",), 5, Grammar.json())
    assert answer.done_reason == "length" and [one.token for one in answer.logprobs or ()] == ["a ", "red "]


@proves("POST /api/generate", "raw", "options.num_predict")
def test_a_raw_prompt_and_answers_without_a_bound(served: Served) -> None:
    assert served.client.generate("talk", "<s>USER: x", raw=True).response == "a red círcle"
    for longest in (-1, -2, 0):
        assert served.client.generate("talk", "x", options={"num_predict": longest}).done_reason == "stop"
    raw, *endless = served.requests
    assert (
        raw.raw and raw.messages[0].content == ("<s>USER: x",) and (raw.max_tokens, raw.fills_context) == (None, False)
    )
    assert {(one.raw, one.max_tokens, one.fills_context) for one in endless} == {(False, None, True)}


@proves("POST /api/generate", "keep_alive")
def test_an_empty_prompt_loads_and_unloads(own: Served) -> None:
    answer = own.client.generate("talk", "", keep_alive="5m")
    assert (answer.response, answer.done, answer.done_reason) == ("", True, "load")
    assert own.fake.loads == [("talk", None)] and own.requests == []
    with pytest.raises(ResponseError, match="keep_alive: is 0, and talk always stays loaded"):
        own.client.generate("talk", keep_alive=0)
    object.__setattr__(own.fake.host.catalog.find("talk").offer, "keep_alive", 300.0)
    assert own.client.generate("talk", keep_alive=0).done_reason == "unload"
    assert own.fake.host.status("talk").state is ModelState.UNLOADED
    assert own.client.generate("talk", "x").response == "a red círcle", "requests load it again"


@proves("POST /api/generate", "width", "height", "steps")
@proves(
    "POST /api/generate",
    "options.negative_prompt",
    "options.guidance_scale",
    "options.sampler",
    "options.strength",
)
def test_a_picture(served: Served) -> None:
    options = {"seed": 9, "negative_prompt": "blue", "guidance_scale": 3.5, "sampler": "euler"}
    drawn = served.client.generate("draw", "a circle", width=32, height=16, steps=3, options=options)
    assert drawn.image is not None and (drawn.response, drawn.done, drawn.done_reason) == ("", True, "stop")
    assert np.array_equal(decode_image(base64.b64decode(drawn.image)), served.fake.draw.picture)
    (request,) = served.requests
    assert (request.prompt, request.width, request.height, request.steps) == ("a circle", 32, 16, 3)
    assert (request.seed, request.negative_prompt, request.guidance_scale) == (9, "blue", 3.5)
    assert (request.sampler, request.image) == ("euler", None)
    served.client.generate("draw", "a circle", images=[PICTURE], options={"strength": 0.3})
    assert (served.requests[1].image.data, served.requests[1].strength) == (PICTURE, 0.3)


@proves("POST /api/generate", "stream")
def test_the_progress_of_a_picture(served: Served) -> None:
    pieces = list(served.client.generate("draw", "a circle", steps=3, stream=True))
    assert [(piece.completed, piece.total) for piece in pieces[:-1]] == [(1, 3), (2, 3), (3, 3)]
    assert [piece.image is None for piece in pieces] == [True, True, True, False]
    assert [piece.done for piece in pieces] == [False, False, False, True]
    assert (pieces[-1].eval_count, pieces[-1].prompt_eval_count) == (None, None)


@pytest.mark.parametrize(
    ("model", "body", "why"),
    [
        ("talk", {"width": 64}, "width: is for a model that draws, and this one answers"),
        ("talk", {"options": {"sampler": "euler"}}, "options.sampler: is of no use to a model that answers"),
        ("talk", {"suffix": "x"}, "suffix: models here do not fill in"),
        ("talk", {"raw": True, "system": "x"}, "system: does not go with raw: write it into the prompt"),
        ("talk", {"raw": "yes"}, "raw: input should be a valid boolean"),
        ("draw", {"raw": True}, "raw: is for a model that answers, and this one draws"),
        ("talk", {"template": "{{ .Prompt }}"}, "template: templates of Ollama are not read here: send raw true"),
        ("talk", {"context": [1, 2]}, "context: send the conversation to /api/chat"),
        ("talk", {"think": True}, "think: models here have no thoughts"),
        ("talk", {"images": ["?"]}, "images[0]: is no base64"),
        ("draw", {"system": "x"}, "system: is for a model that answers, and this one draws"),
        ("draw", {"format": "json"}, "format: is for a model that answers"),
        ("draw", {"options": {"temperature": 1}}, "options.temperature: is of no use to a model that draws"),
        ("draw", {"images": ["x", "y"]}, "images: has 2 pictures, and drawing begins with one"),
        ("draw", {"steps": 0}, "steps: is 0, expected 1 to 1000"),
        ("draw", {"width": 100_000}, "width: is 100000"),
        ("draw", {"options": {"seed": 1 << 63}}, "options.seed: is 9223372036854775808"),
        ("draw", {"options": {"strength": 0.5}}, "options.strength: is of a picture to begin with"),
        ("nobody", {}, "model 'nobody' is not served here"),
    ],
)
def test_mistakes(served: Served, model: str, body: dict[str, Any], why: str) -> None:
    status, content = served.post("/api/generate", {"model": model, "prompt": "x", **body})
    assert status == (404 if model == "nobody" else 400) and content["error"].startswith(why), content


def test_fields_that_mean_without(served: Served) -> None:
    body = {"raw": False, "template": "", "suffix": "", "context": [], "think": False, "shift": False, "format": ""}
    assert served.post("/api/generate", {"model": "talk", "prompt": "x", **body})[1]["done"] is True


def test_curl_says_that_json_is_a_form(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=20)
    header = {"content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/api/generate", '{"model": "talk", "prompt": "x", "stream": false}', header)
    response = connection.getresponse()
    assert response.status == 200 and b"c\xc3\xadrcle" in response.read()
    connection.close()
