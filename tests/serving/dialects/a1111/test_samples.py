"""The sample models: what clients of the web UI get equals what gRPC gives for the same seed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webuiapi import WebUIApi

from runtime.vision.images import Picture, encode_image
from serving.dialects.grpc.client import Client
from serving.enginecast_pb import chat_pb2, image_pb2
from tests.fakes.samples import Samples, serving

DRAW, TALK = "shapes-diffusion", "shapes-vlm"


@pytest.fixture
def samples(diffusion_bundle: Path, vlm_bundle: Path) -> Iterator[Samples]:
    with serving(diffusion_bundle, vlm_bundle, target="onnxruntime") as server:
        yield server


def test_answers_equal_those_of_grpc(samples: Samples) -> None:
    api: Any = WebUIApi(baseurl=f"{samples.http}/sdapi/v1")
    with Client(samples.grpc) as client:

        def drawn(**fields: Any) -> list[Picture]:
            wanted = image_pb2.GenerateRequest(
                model=DRAW, prompt="a (large:1.2) red circle", prompt_weights=True, steps=3, width=64, height=64,
                guidance_scale=2, **fields,
            )  # fmt: skip
            responses = client.generate(wanted, timeout=120)
            return [_pixels(one.image.png) for one in responses if one.HasField("image")]

        same = {"prompt": "a (large:1.2) red circle", "steps": 3, "width": 64, "height": 64, "cfg_scale": 2}
        found = api.txt2img(**same, seed=3, n_iter=2, sampler_name="DPM++ 2M", scheduler="Uniform")
        expected = [*drawn(seed=3, sampler="dpmpp_2m"), *drawn(seed=4, sampler="dpmpp_2m")]
        _equal(found.images, expected)
        read = api.png_info(found.images[1]).parameters
        assert (read["Seed"], read["Size-1"], read["Steps"], read["Model"]) == ("4", "64", "3", DRAW)

        first, mask = encode_image(expected[0]), np.zeros((64, 64, 3), np.uint8)
        mask[16:48, 16:48] = 255
        picture = {"images": [found.image], "denoising_strength": 0.7, "seed": 5, "sampler_name": "Euler"}
        _equal(api.img2img(**same, **picture).images, drawn(seed=5, sampler="euler", image=first, strength=0.7))
        whole = {"inpaint_full_res": False, "inpainting_fill": 1, "mask_blur": 0, "mask_image": Image.fromarray(mask)}
        painted = api.img2img(**same, **picture, **whole).images
        _equal(painted, drawn(seed=5, sampler="euler", image=first, strength=0.7, mask=encode_image(mask)))

        parts = [chat_pb2.Part(image=first), chat_pb2.Part(text="what color is the circle?")]
        turn = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=parts)
        events = client.chat(chat_pb2.ChatRequest(model=TALK, messages=[turn], max_tokens=8), timeout=120)
        text = "".join(event.delta.text for event in events if event.HasField("delta"))
        asked = {"image": base64.b64encode(first).decode(), "question": "what color is the circle?", "max_tokens": 8}
        answer = api.session.post(f"{api.baseurl}/vqa", json=asked).json()
        assert answer == {"answer": text.strip()} and text.strip()


def _pixels(png: bytes) -> Picture:
    return np.asarray(Image.open(io.BytesIO(png)))


def _equal(found: list[Any], expected: list[Picture]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), other)
