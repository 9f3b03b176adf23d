"""Second passes and changed noise as clients of the web UI ask for them."""

from __future__ import annotations

from typing import Any

import pytest
from webuiapi import HiResUpscaler

from runtime.diffusion.hires import Hires
from tests.fakes.proofs import proves
from tests.serving.dialects.a1111.conftest import DRAW, Studio

PATH = "/sdapi/v1/txt2img"


@proves("POST /sdapi/v1/txt2img", "enable_hr", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "denoising_strength")
def test_the_client_library_draws_twice(studio: Studio) -> None:
    result = studio.api.txt2img(
        prompt="a", seed=7, steps=3, width=64, height=32, enable_hr=True, hr_scale=1.5, hr_second_pass_steps=2,
        hr_upscaler=HiResUpscaler.LatentNearestExact, denoising_strength=0.6, sampler_name="Euler",
    )  # fmt: skip
    (found,) = studio.requests
    assert found.hires == Hires(1.5, upscaler="latent_nearest_exact", steps=2, strength=0.6)
    assert (found.width, found.height, found.strength) == (64, 32, None)
    assert result.info["denoising_strength"] == 0.6
    (text,) = result.info["infotexts"]
    assert "Denoising strength: 0.6, Seed: 7, Size: 64x32, Hires upscale: 1.5, Hires steps: 2, " in text


@proves("POST /sdapi/v1/txt2img", "hr_resize_x", "hr_resize_y", "hr_prompt", "hr_negative_prompt", "hr_sampler_name")
@proves("POST /sdapi/v1/txt2img", "hr_scheduler", "firstphase_width", "firstphase_height")
def test_fields_of_a_second_pass(studio: Studio) -> None:
    def hires(**fields: Any) -> Any:
        return studio.draw(PATH, enable_hr=True, **fields).hires

    assert hires() == Hires(strength=0.75)
    assert studio.draw(PATH, hr_scale=2, denoising_strength=0.5).hires is None
    assert hires(hr_resize_x=64, hr_scale=3) == Hires(width=64, strength=0.75)
    assert hires(hr_resize_x=64, hr_resize_y=48, hr_upscaler="None") == Hires(
        width=64, height=48, strength=0.75, upscaler="lanczos"
    )
    words = hires(prompt="a <lora:x:0.5>", hr_prompt="b <lora:x:0.5>", hr_negative_prompt="c")
    assert (words.prompt, words.negative_prompt) == ("b", "c")
    assert (
        hires(hr_sampler_name="DDIM", scheduler="Karras", sampler_name="Euler", hr_scheduler="Uniform").sampler
        == "ddim"
    )
    assert (
        hires(hr_sampler_name="Use same sampler", sampler_name="Euler", hr_scheduler="Karras").sampler == "euler_karras"
    )
    assert hires(hr_sampler_name="Use same sampler", hr_scheduler="Use same scheduler").sampler is None
    old = studio.draw(PATH, enable_hr=True, firstphase_width=16, firstphase_height=24, width=64, height=48)
    assert (old.width, old.height) == (16, 24)
    assert old.hires == Hires(width=64, height=48, strength=0.75)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hr_upscaler": "ESRGAN_4x"}, "hr_upscaler: 'ESRGAN_4x' is not known"),
        ({"hr_scale": 0.5}, "hr_scale: is 0.5, expected 1 to 8"),
        ({"denoising_strength": 2}, "denoising_strength: is 2"),
        ({"hr_second_pass_steps": 1001}, "hr_second_pass_steps: is 1001"),
        ({"hr_prompt": "<lora:x>"}, "hr_prompt: names other LoRAs than prompt"),
        ({"hr_prompt": "a [b:c:0.5]"}, "hr_prompt: has '[b:c:0.5]'"),
        ({"hr_negative_prompt": "a AND b"}, "hr_negative_prompt: has 'AND'"),
        ({"hr_scheduler": "Karras"}, "hr_scheduler: comes without a sampler"),
        ({"hr_checkpoint_name": "other"}, "hr_checkpoint_name: one model draws both passes"),
    ],
)
def test_what_is_refused_of_a_second_pass(studio: Studio, fields: dict[str, Any], why: str) -> None:
    assert studio.refused(PATH, enable_hr=True, **fields).startswith(why)


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "subseed", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w")
@proves("POST /sdapi/v1/img2img", "subseed", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w")
def test_changed_noise(studio: Studio, path: str) -> None:
    found = studio.draw(path, seed=5, subseed=9, subseed_strength=0.25, seed_resize_from_h=16, seed_resize_from_w=24)
    assert (found.seed, found.variation_seed, found.variation_strength, found.noise_size) == (5, 9, 0.25, (16, 24))
    plain = studio.draw(path, subseed=9, subseed_strength=0, seed_resize_from_h=-1, seed_resize_from_w=0)
    assert (plain.variation_seed, plain.variation_strength, plain.noise_size) == (None, None, None)
    assert studio.draw(path, subseed=-1, subseed_strength=1).variation_seed >= 0
    assert studio.refused(path, subseed=9, subseed_strength=2).startswith("subseed_strength: is 2")


def test_batches_keep_the_seed_and_count_the_variations(studio: Studio) -> None:
    result = studio.api.txt2img(prompt="a", seed=5, subseed=9, subseed_strength=0.5, n_iter=2, batch_size=2, steps=1)
    assert [(one.seed, one.variation_seed, one.images) for one in studio.requests] == [(5, 9, 2), (5, 11, 2)]
    assert result.info["all_subseeds"] == [9, 10, 11, 12] and result.info["subseed_strength"] == 0.5
    assert "Variation seed: 10, Variation seed strength: 0.5" in result.info["infotexts"][1]


@proves("POST /sdapi/v1/txt2img", "script_args")
def test_axes_of_second_passes_and_variations(studio: Studio) -> None:
    args = ["Var. strength", "0,0.5", [], "Hires upscaler", "Latent, Lanczos", []]
    studio.draw(PATH, script_name="X/Y/Z plot", script_args=args, enable_hr=True, subseed=3, seed=5)
    cells = [(one.variation_strength, one.hires.upscaler, one.variation_seed, one.seed) for one in studio.requests[:4]]
    assert cells == [(strength, way, 3, 5) for way in ("latent", "lanczos") for strength in (0.0, 0.5)]
    why = studio.refused(PATH, script_name="X/Y/Z plot", script_args=["Hires steps", "1-3"])
    assert why.startswith("script_args: has the axis Hires steps, which is of a second pass: send enable_hr")
