"""A sample with a trained control network and a LoRA: what clients of the web UI get equals what gRPC gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webuiapi import ControlNetUnit, HiResUpscaler, WebUIApi

from runtime.vision.images import Picture, encode_image
from serving.dialects.grpc.client import Client
from serving.enginecast_pb import image_pb2
from tests.fakes.samples import Samples, serving
from tests.serving.dialects.a1111.test_samples import _equal, _pixels

ADDED = Path(__file__).parents[4] / "samples" / "shapes-additions"
NAME = "shapes-diffusion"
PROMPT = "a large red circle"
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from export.build.build import build
    from export.build.options import Options
    from export.checkpoint.additions import Addition

    output = tmp_path_factory.mktemp("added") / "bundle"
    added = Addition("controlnet", ADDED / "edges", "edges"), Addition("adapter", ADDED / "night.safetensors", "night")
    build(Options("sample:shapes-diffusion", output, additions=added, targets=("onnxruntime",), parity="twin"))
    return output


@pytest.fixture
def samples(bundle: Path) -> Iterator[Samples]:
    with serving(bundle, target="onnxruntime") as server:
        yield server


def test_answers_equal_those_of_grpc(samples: Samples) -> None:
    api: Any = WebUIApi(baseurl=f"{samples.http}/sdapi/v1")
    edges = np.zeros((64, 64, 3), np.uint8)
    edges[16:48, 16], edges[16:48, 47], edges[16, 16:48], edges[47, 16:48] = 255, 255, 255, 255
    with Client(samples.grpc) as client:

        def drawn(**fields: Any) -> Picture:
            wanted = image_pb2.GenerateRequest(
                model=NAME, prompt=PROMPT, prompt_weights=True, steps=4, width=64, height=64, guidance_scale=2, seed=3,
                sampler="euler", **fields,
            )  # fmt: skip
            (found,) = (one.image.png for one in client.generate(wanted, timeout=120) if one.HasField("image"))
            return _pixels(found)

        def asked(prompt: str = PROMPT, **fields: Any) -> Any:
            same = {"steps": 4, "width": 64, "height": 64, "cfg_scale": 2, "seed": 3, "sampler_name": "Euler"}
            return api.txt2img(prompt=prompt, **same, **fields, alwayson_scripts={})

        plain = drawn()
        assert api.get_loras()[0]["name"] == "night" and api.controlnet_model_list() == ["edges"]
        unit = ControlNetUnit(image=Image.fromarray(edges), model="edges", module="none", weight=0.8, guidance_end=0.75)
        control = image_pb2.Control(name="edges", image=encode_image(edges), scale=0.8, end=0.75)
        followed = drawn(controls=[control])
        _equal(asked(controlnet_units=[unit]).images, [followed])
        night = drawn(loras={"night": 0.7})
        _equal(asked(f"{PROMPT} <lora:night:0.7>").images, [night])
        assert not np.array_equal(plain, followed) and not np.array_equal(plain, night)

        both = {"controls": [control], "loras": {"night": 0.7}}
        hires = image_pb2.Hires(scale=1.5, upscaler="latent_bicubic", steps=2, strength=0.5)
        second = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": HiResUpscaler.LatentBicubic,
            "hr_second_pass_steps": 2, "denoising_strength": 0.5}  # fmt: skip
        found = asked(f"{PROMPT} <lora:night:0.7>", controlnet_units=[unit], **second)
        assert found.image.size == (96, 96)
        _equal(found.images, [drawn(**both, hires=hires)])

        size = image_pb2.Pixels(down=32, across=64)
        varied = drawn(variation_seed=9, variation_strength=0.3, noise_size=size)
        resized = {"seed_resize_from_h": 32, "seed_resize_from_w": 64}
        _equal(asked(subseed=9, subseed_strength=0.3, **resized).images, [varied])
        assert not np.array_equal(plain, varied)
