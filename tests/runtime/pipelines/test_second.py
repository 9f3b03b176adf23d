"""A second pass at a larger size: the same as both passes by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.hires import Hires
from runtime.diffusion.solver import make_sampler
from runtime.diffusion.variation import random_stream
from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.pipeline import Progress, drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.enlarging import PICTURES, enlarged
from tests.runtime.pipelines.test_diffusion import CONFIG, fakes, pictures, tokenizer

__all__ = ["tokenizer"]

SETTINGS = CONFIG | {"vae": CONFIG["vae"] | {"encoder": True}}
REQUEST = ImageRequest("ab", "c", width=24, height=16, seed=7, steps=4, sampler="euler_ancestral", images=2)


@pytest.fixture(scope="module")
def pipeline(tokenizer: Path) -> DiffusionPipeline:
    return DiffusionPipeline(DiffusionConfig.parse(SETTINGS), tokenizer)


def engines() -> dict[str, FakeEngine]:
    """Those of other tests with an encoder: latents of the first pixel of each square, and of their mean."""

    def encode(inputs: Mapping[str, Array]) -> dict[str, Array]:
        pixels = np.asarray(inputs["image"], np.float32)[:, :, ::2, ::2]
        return {"latents": np.concatenate([pixels, pixels.mean(axis=1, keepdims=True)], axis=1)}

    return fakes() | {"vae_encoder": FakeEngine(encode)}


@pytest.mark.parametrize("upscaler", PICTURES)
def test_enlarged_pixels_equal_image_to_image_by_hand(pipeline: DiffusionPipeline, upscaler: str) -> None:
    hires = Hires(upscaler=upscaler, steps=2, strength=0.5, prompt="ba", sampler="euler")
    found = pictures(pipeline, replace(REQUEST, hires=hires), engines())
    for index, first in enumerate(pictures(pipeline, REQUEST, engines())):
        larger = np.asarray(Image.fromarray(np.array(first.image)).resize((48, 32), PICTURES[upscaler]))
        again = ImageRequest(
            "ba", "c", width=48, height=32, seed=7 + index, steps=4, sampler="euler", image=larger, strength=0.5
        )
        (expected,) = pictures(pipeline, again, engines())
        np.testing.assert_array_equal(found[index].image, expected.image)
        assert (found[index].index, found[index].seed) == (index, 7 + index)


def test_enlarged_latents_get_the_noise_of_the_seed(pipeline: DiffusionPipeline) -> None:
    used, alone = engines(), engines()
    hires = Hires(width=32, height=32, upscaler="latent_bicubic", strength=0.7)
    events = list(drive(pipeline(replace(REQUEST, images=1, hires=hires)), used))
    assert [(one.step, one.total) for one in events if isinstance(one, Progress)] == [(i, 8) for i in range(1, 9)]
    (ready,) = (one for one in events if isinstance(one, ImageReady))
    assert ready.image.shape == (32, 32, 3) and not used["vae_encoder"].calls and len(used["vae_decoder"].calls) == 1
    list(drive(pipeline(replace(REQUEST, images=1)), alone))
    clean = alone["vae_decoder"].calls[0]["latents"] * np.float32(CONFIG["vae"]["scaling_factor"])
    cover = enlarged(clean, (16, 24), "latent_bicubic")[:, :, :, 4:20]
    schedule = make_sampler("euler_ancestral", pipeline.config.scheduler, 5).schedule  # int(4 / 0.7)
    noise = random_stream(7).standard_normal((1, 4, 16, 16), np.float32)
    wanted = schedule.model_input(schedule.point(1).noised(cover, noise), schedule.point(1))
    call = used["unet"].calls[4]
    np.testing.assert_allclose(call["sample"], np.repeat(wanted, 2, axis=0), rtol=1e-4, atol=1e-5)
    assert len(used["unet"].calls) == 8 and call["timestep"][0] == schedule.point(1).time


def test_without_strength_the_enlarged_picture_comes_back(pipeline: DiffusionPipeline) -> None:
    used = engines()
    (ready,) = pictures(pipeline, replace(REQUEST, images=1, hires=Hires(1.5, strength=0, upscaler="nearest")), used)
    assert ready.image.shape == (24, 36, 3) and len(used["unet"].calls) == 4


@pytest.mark.parametrize(
    ("hires", "size"),
    [
        (Hires(), ((32, 48), (32, 48))),
        (Hires(1.3), ((20, 28), (20, 28))),
        (Hires(width=32), ((20, 32), (20, 32))),
        (Hires(height=32), ((32, 48), (32, 48))),
        (Hires(width=32, height=32), ((32, 32), (32, 48))),
    ],
)
def test_sizes(hires: Hires, size: Any) -> None:
    assert hires.sizes((16, 24), 4) == size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 2.0, "width": 32}, "hires.scale: comes with a width or height"),
        ({"scale": 0.5}, "hires.scale: is 0.5, expected 1 to 8"),
        ({"upscaler": "esrgan"}, "hires.upscaler: 'esrgan' is not known"),
        ({"scale": 4.0}, "hires.width: is 96 pixels, expected 8 to 64"),
        ({"sampler": "none"}, "hires.sampler: 'none' is not known"),
        ({"strength": 1e-310}, "hires.strength: is 1e-310, of which 4 steps are the last of 9,223,372"),
        (
            {"strength": 0.001},
            "hires.strength: is 0.001, of which 4 steps are the last of 4,000, expected at most 1,000",
        ),
        ({"steps": 1001}, "hires.steps: is 1001, expected 1 to 1000"),
        ({"prompt": "a" * 99}, "hires.prompt: "),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipeline: DiffusionPipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        pipeline(replace(REQUEST, hires=Hires(**fields)))


def test_a_bundle_without_an_encoder_enlarges_latents_only(tokenizer: Path) -> None:
    older = DiffusionPipeline(DiffusionConfig.parse(CONFIG), tokenizer)
    older(replace(REQUEST, hires=Hires())).close()
    with pytest.raises(InvalidInput, match=r"hires\.upscaler: lanczos needs the encoder of the VAE"):
        older(replace(REQUEST, hires=Hires(upscaler="lanczos")))


@pytest.mark.parametrize("fields", [{"image": np.zeros((16, 16, 3), np.uint8)}, {"denoising_end": 0.5}])
def test_it_has_no_place_beside_pictures_and_parts(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="hires: is of pictures that are drawn whole, and from noise"):
        replace(REQUEST, hires=Hires(), **fields)


def test_the_masked_part_begins_with_noise_or_nothing(pipeline: DiffusionPipeline) -> None:
    picture = np.full((16, 24, 3), 200, np.uint8)
    mask = np.zeros((16, 24, 3), np.uint8)
    mask[:, 12:] = 255
    given = replace(REQUEST, images=1, image=picture, mask=mask, strength=0.5)
    noise = random_stream(7).standard_normal((1, 4, 8, 12), np.float32)
    schedule = make_sampler("euler_ancestral", pipeline.config.scheduler, 4).schedule
    point = schedule.point(2)
    found = {}
    for fill in ("original", "noise", "nothing"):
        used = engines()
        list(drive(pipeline(replace(given, mask_fill=fill)), used))
        found[fill] = used["unet"].calls[0]["sample"][:1]
    for fill, clean in (("noise", noise), ("nothing", 0 * noise)):
        begun = schedule.model_input(point.noised(clean, noise), point)
        np.testing.assert_allclose(found[fill][..., 6:], begun[..., 6:], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[fill][..., :6], found["original"][..., :6])
    assert np.abs(found["original"][..., 6:] - found["nothing"][..., 6:]).min() > 0
    with pytest.raises(InvalidInput, match="mask_fill: is 'red', expected one of original, noise, nothing"):
        replace(given, mask_fill="red")


def test_noise_of_a_size_beyond_the_model_s_is_refused(pipeline: DiffusionPipeline) -> None:
    with pytest.raises(InvalidInput, match=r"noise_size: is \(65536, 8\), expected two lengths of 2 to 64 pixels"):
        pipeline(replace(REQUEST, noise_size=(65536, 8)))
