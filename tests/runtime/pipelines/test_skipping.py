"""Steps that a picture does without: guidance in a part of them, compared with loops that are written by hand over
diffusers' own scheduler and UNet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.variation import random_stream
from runtime.errors import InvalidInput
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.tasks.image import ImageRequest
from tests.runtime.pipelines.test_diffusion import (
    CONFIG,
    added_fakes,
    fakes,
    modules_as_engines,
    pictures,
    tiny,
    tokenizer,
)

__all__ = ["tokenizer"]  # the fixture
pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning")  # torch tensors inside diffusers
STEPS, SCALE = 10, 4.0
NEAREST = 1e-4


@pytest.fixture(scope="module")
def pipeline(tokenizer: Path) -> DiffusionPipeline:
    return DiffusionPipeline(DiffusionConfig.parse(CONFIG), tokenizer)


Guided = Callable[[int], bool]


def by_hand(pipe: Any, latents: Array, guided: Guided) -> Array:
    """Final latents of "a red ab" without "blue", by diffusers' scheduler and UNet."""
    import torch

    def states(text: str) -> Any:
        ids = pipe.tokenizer(text, padding="max_length", max_length=pipe.tokenizer.model_max_length)["input_ids"]
        return pipe.text_encoder(torch.tensor([ids]))[0]

    x, scheduler = torch.from_numpy(latents), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        negative, positive = states("blue"), states("a red ab")
        for index, time in enumerate(scheduler.timesteps):
            output = pipe.unet(x, time, positive)[0]
            if guided(index):
                other = pipe.unet(x, time, negative)[0]
                output = other + SCALE * (output - other)
            x = scheduler.step(output, time, x)[0]
    return np.asarray(x)


def final_latents(engines: Any) -> Array:
    """What the decoder was given, as the schedule has it."""
    (call,) = engines["vae_decoder"].calls
    return np.asarray(call["latents"]) * np.float32(CONFIG["vae"]["scaling_factor"])


@pytest.mark.parametrize(
    ("start", "end", "guided"), [(0.2, 0.65, range(2, 6)), (None, 0.5, range(5)), (0.5, None, range(5, 10))]
)
def test_guidance_in_a_part_of_the_steps_is_as_by_hand(
    tokenizer: Path, pipeline: DiffusionPipeline, start: float | None, end: float | None, guided: range
) -> None:
    pipe, latents = tiny(tokenizer), random_stream(3).standard_normal((1, 4, 12, 8), np.float32)
    engines = modules_as_engines(pipe)
    request = ImageRequest(
        "a red ab", "blue", 16, 24, steps=STEPS, guidance_scale=SCALE, guidance_start=start, guidance_end=end, seed=3,
        latents=latents,
    )  # fmt: skip
    pictures(pipeline, request, engines)
    rows = [len(call["sample"]) for call in engines["unet"].calls]
    assert rows == [2 if index in guided else 1 for index in range(STEPS)]
    expected = by_hand(pipe, latents, lambda index: index in guided)
    np.testing.assert_allclose(final_latents(engines), expected, atol=NEAREST)
    everywhere = by_hand(pipe, latents, lambda index: True)
    assert np.abs(expected - everywhere).max() > 100 * NEAREST, "the interval changes the picture"


def test_every_input_of_a_step_without_guidance_has_one_row(tokenizer: Path) -> None:
    config = DiffusionConfig.parse(CONFIG | {"added": {"force_zeros_for_empty_prompt": True}})
    engines = added_fakes()
    added = DiffusionPipeline(config, tokenizer, tokenizer)
    pictures(added, ImageRequest("ab", "c", seed=0, guidance_end=0.5, negative_original_size=(7, 8)), engines)
    calls = engines["unet"].calls
    assert [{len(array) for array in call.values()} for call in calls] == [{2}, {2}, {1}, {1}]
    assert (calls[2]["text_embeds"] == calls[0]["text_embeds"][1:]).all()
    assert calls[2]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]], "the prompt's own"


def test_an_interval_of_all_steps_is_guidance_as_always(pipeline: DiffusionPipeline) -> None:
    request, engines = ImageRequest("ab", seed=0, guidance_start=0.0, guidance_end=1.0), fakes()
    (whole,) = pictures(pipeline, request, engines)
    np.testing.assert_array_equal(whole.image, pictures(pipeline, ImageRequest("ab", seed=0))[0].image)
    assert {len(call["sample"]) for call in engines["unet"].calls} == {2}


def test_a_model_that_receives_the_scale_takes_no_interval(tokenizer: Path) -> None:
    distilled = DiffusionPipeline(DiffusionConfig.parse(CONFIG | {"guidance_embedding": 8}), tokenizer)
    with pytest.raises(
        InvalidInput, match="guidance_end: is of guidance by a negative prompt, and this model receives"
    ):
        distilled(ImageRequest("ab", guidance_end=0.5))
