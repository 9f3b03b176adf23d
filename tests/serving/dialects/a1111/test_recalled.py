"""The request field `infotext`."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.diffusion.hires import Hires
from tests.fakes.proofs import proves
from tests.serving.dialects.a1111.conftest import DRAW, Studio

TEXT = (
    "a red circle <lora:soft:0.5>\nNegative prompt: blur\nSteps: 3, Sampler: Euler, Schedule type: Karras, CFG scale: "
    "5, Seed: 9, Size: 64x32, Variation seed: 4, Variation seed strength: 0.5, Seed resize from: 24x16, Model: other"
)


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "infotext")
@proves("POST /sdapi/v1/img2img", "infotext")
def test_values_of_an_infotext(studio: Studio, path: str) -> None:
    found = studio.draw(path, infotext=TEXT, steps=2)
    assert (found.prompt, found.negative_prompt, found.loras) == ("a red circle", "blur", {"soft": 0.5})
    assert (found.steps, found.sampler, found.guidance_scale, found.seed) == (2, "euler_karras", 5.0, 9)
    assert (found.width, found.height, found.noise_size) == (64, 32, (16, 24))
    assert (found.variation_seed, found.variation_strength) == (4, 0.5)
    assert studio.draw(path, infotext="").prompt == ""


def test_a_second_pass_of_an_infotext(studio: Studio) -> None:
    later = "a\nSteps: 3, Seed: 1, Size: 16x16, Denoising strength: 0.5, Hires upscale: 1.5, Hires upscaler: Lanczos"
    assert studio.draw(DRAW[0], infotext=later).hires == Hires(1.5, upscaler="lanczos", strength=0.5)
    sized = "a\nSteps: 3, Seed: 1, Hires resize: 64x0, Hires steps: 2"
    assert studio.draw(DRAW[0], infotext=sized).hires == Hires(width=64, steps=2, strength=0.75)
    assert studio.draw(DRAW[1], infotext=later).hires is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\nSteps: x, Seed: 1, Size: 16x16", "infotext: has 'x' as Steps, expected a number"),
        ("a\nSteps: 1, Seed: 1, Size: big", "infotext: has 'big' as Size, expected a size such as 512x512"),
        (f"a\nSteps: 1, Seed: 1, Size: {'9' * 5000}x1", "infotext: has '999"),
        ("a\nSteps: 1, Seed: 1, Sampler: Restart", "sampler_name: 'Restart' is not known"),
        ("x" * 100_001, "infotext: has 100,001 characters"),
    ],
)
def test_what_is_refused_of_an_infotext(studio: Studio, text: str, why: Any) -> None:
    assert studio.refused(DRAW[0], infotext=text).startswith(why)
