"""Answers and pictures of real models over HTTP are those of gRPC for the same seed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import BaseModel

from runtime.vision.images import Picture, decode_image, encode_image
from tests.fakes.samples import Samples, serving

DRAW, TALK = "shapes-diffusion", "shapes-vlm"
PROMPT = "a large red circle"


class Found(BaseModel):
    colour: Literal["red", "green", "blue"]


@pytest.fixture(scope="module")
def samples(diffusion_bundle: Path, vlm_bundle: Path) -> Iterator[Samples]:
    with serving(diffusion_bundle, vlm_bundle) as server:
        yield server


@pytest.fixture(scope="module")
def client(samples: Samples) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{samples.http}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def picture(samples: Samples) -> Picture:
    with samples.client(DRAW) as client:
        return client.generate(PROMPT, steps=6, seed=3).image


def pixels(text: str | None) -> Picture:
    return decode_image(base64.b64decode(text or ""))


def shown(picture: Picture) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(encode_image(picture)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_pictures(client: openai.OpenAI, samples: Samples, picture: Picture) -> None:
    extra = {"steps": 6, "seed": 3}
    (one,) = client.images.generate(model=DRAW, prompt=PROMPT, extra_body=extra).data or ()
    np.testing.assert_array_equal(pixels(one.b64_json), picture)
    events = list(client.images.generate(model=DRAW, prompt=PROMPT, stream=True, partial_images=2, extra_body=extra))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    np.testing.assert_array_equal(pixels(events[-1].b64_json), picture)
    assert not np.array_equal(pixels(events[0].b64_json), picture)


def test_a_part_drawn_anew(client: openai.OpenAI, samples: Samples, picture: Picture) -> None:
    height, width = picture.shape[:2]
    alpha = np.full((height, width), 255, np.uint8)
    alpha[:, : width // 2] = 0
    mask = np.repeat(np.where(alpha == 0, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)
    with samples.client(DRAW) as direct:
        expected = direct.generate(
            "a green square", image=picture, mask=mask, strength=1.0, steps=4, seed=5, guidance_scale=3.0
        ).image
    file = io.BytesIO()
    Image.fromarray(np.dstack([picture, alpha])).save(file, "png")
    (one,) = (
        client.images.edit(
            model=DRAW,
            prompt="a green square",
            image=encode_image(picture),
            mask=file.getvalue(),
            extra_body={"strength": 1.0, "steps": 4, "seed": 5, "guidance_scale": 3.0},
        ).data
        or ()
    )
    np.testing.assert_array_equal(pixels(one.b64_json), expected)
    np.testing.assert_array_equal(expected[:, width // 2 :], picture[:, width // 2 :])


def test_answers(client: openai.OpenAI, samples: Samples, picture: Picture) -> None:
    question = "describe the picture"
    with samples.client(TALK) as direct:
        expected = direct.chat(question, [picture], temperature=0.8, seed=7, max_tokens=24, answers=2)
    asked: Any = {
        "model": TALK,
        "messages": [{"role": "user", "content": [shown(picture), {"type": "text", "text": question}]}],
        "temperature": 0.8,
        "seed": 7,
        "max_tokens": 24,
        "n": 2,
    }
    found = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in found.choices] == [choice.text for choice in expected.choices]
    assert [choice.finish_reason for choice in found.choices] == [choice.reason for choice in expected.choices]
    assert found.usage is not None and found.usage.prompt_tokens == expected.prompt_tokens
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True, logprobs=True, top_logprobs=1):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        for token in (choice.logprobs and choice.logprobs.content) or ():
            assert token.logprob <= token.top_logprobs[0].logprob <= 0
    assert texts == [choice.text for choice in expected.choices]


def test_answers_without_a_temperature_are_equal(client: openai.OpenAI) -> None:
    asked: Any = {"model": TALK, "messages": [{"role": "user", "content": "what is it?"}], "max_tokens": 8}
    one, three = (client.chat.completions.create(**asked, n=count) for count in (1, 3))
    texts = [choice.message.content for choice in three.choices]
    assert texts == [one.choices[0].message.content] * 3 and one.usage is not None and three.usage is not None
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_answers_of_a_form(client: openai.OpenAI, picture: Picture) -> None:
    messages: Any = [{"role": "user", "content": [shown(picture), {"type": "text", "text": "what is it?"}]}]
    found = client.chat.completions.parse(model=TALK, messages=messages, response_format=Found, max_tokens=300)
    assert isinstance(found.choices[0].message.parsed, Found)


@pytest.mark.parametrize(
    "sent, field",
    [
        ({"temperature": 101}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"n": 3, "extra_body": {"beams": 2}}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "paint"}}]}, "tools"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ],
)
def test_what_a_model_refuses_is_named(client: openai.OpenAI, sent: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=TALK, messages=[{"role": "user", "content": "x"}], **sent)
    assert caught.value.param == field, caught.value.message
