"""What a picture does without: guidance in a part of its steps, and the denoiser in others. Compared with loops that
are written by hand over diffusers' own scheduler and UNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.schedule import Latents
from runtime.diffusion.variation import random_stream
from runtime.errors import Cancelled, InvalidInput
from runtime.pipeline import Note, Progress, drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.tasks.image import ImageReady, ImageRequest
from serving.host.job import Done, Job
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


@pytest.fixture(scope="module")
def pipe(tokenizer: Path) -> Any:
    return tiny(tokenizer)


Guided = Callable[[int], bool]


def by_hand(pipe: Any, latents: Latents, guided: Guided, computed: Guided = lambda index: True) -> Latents:
    """Final latents of "a red ab" without "blue", by diffusers' scheduler and UNet. In steps that are not computed, the
    clean latents of each prompt follow half the slope of the last two over the log of signal over noise.
    """
    import torch

    past: dict[str, list[tuple[float, Any]]] = {"positive": [], "negative": []}

    def output(name: str, states: Any, index: int, x: Any, time: Any) -> Any:
        alpha = scheduler.alphas_cumprod[time].sqrt()
        sigma = (1 - alpha**2).sqrt()
        place = math.log(alpha / sigma)
        if computed(index):
            found = pipe.unet(x, time, states)[0]
            past[name].append((place, (x - sigma * found) / alpha))
            return found
        (before, first), (after, second) = past[name][-2:]
        clean = second + 0.5 * (place - after) / (after - before) * (second - first)
        return (x - alpha * clean) / sigma

    def states(text: str) -> Any:
        ids = pipe.tokenizer(text, padding="max_length", max_length=pipe.tokenizer.model_max_length)["input_ids"]
        return pipe.text_encoder(torch.tensor([ids]))[0]

    x, scheduler = torch.from_numpy(latents), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        negative, positive = states("blue"), states("a red ab")
        for index, time in enumerate(scheduler.timesteps):
            found = output("positive", positive, index, x, time)
            if guided(index):
                other = output("negative", negative, index, x, time)
                found = other + SCALE * (found - other)
            x = scheduler.step(found, time, x)[0]
    return np.asarray(x)


def final_latents(engines: Any) -> Latents:
    """What the decoder was given, as the schedule has it."""
    (call,) = engines["vae_decoder"].calls
    return np.asarray(call["latents"]) * np.float32(CONFIG["vae"]["scaling_factor"])


@pytest.mark.parametrize(("start", "end", "guided"), [(0.2, 0.65, range(2, 6)), (0.5, None, range(5, 10))])
def test_guidance_in_a_part_of_the_steps_is_as_by_hand(
    pipe: Any, pipeline: DiffusionPipeline, start: float | None, end: float | None, guided: range
) -> None:
    latents = random_stream(3).standard_normal((1, 4, 12, 8), np.float32)
    engines = modules_as_engines(pipe)
    request = ImageRequest(
        "a red ab", "blue", 16, 24, steps=STEPS, guidance_scale=SCALE, guidance_start=start, guidance_end=end, seed=3,
        latents=latents,
    )  # fmt: skip
    pictures(pipeline, request, engines)
    rows = [len(call["sample"]) for call in engines["unet"].calls]
    assert rows == [2 if index in guided else 1 for index in range(STEPS)]
    expected = by_hand(pipe, latents, lambda index: index in guided)
    np.testing.assert_allclose(final_latents(engines), expected, rtol=NEAREST, atol=NEAREST)
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


# The denoiser in a part of the steps


@pytest.mark.parametrize(("guided", "computed"), [(range(10), (0, 1, 3, 5, 8, 9)), (range(5), (0, 1, 2, 4, 7, 9))])
def test_a_forecast_is_as_by_hand(
    pipe: Any, pipeline: DiffusionPipeline, guided: range, computed: tuple[int, ...]
) -> None:
    latents = random_stream(3).standard_normal((1, 4, 12, 8), np.float32)
    engines = modules_as_engines(pipe)
    request = ImageRequest(
        "a red ab", "blue", 16, 24, steps=STEPS, guidance_scale=SCALE, guidance_end=len(guided) / STEPS, seed=3,
        latents=latents, forecast=",".join(str(index + 1) for index in computed),
    )  # fmt: skip
    pictures(pipeline, request, engines)
    assert [len(call["sample"]) for call in engines["unet"].calls] == [1 + (index in guided) for index in computed]
    expected = by_hand(pipe, latents, lambda index: index in guided, lambda index: index in computed)
    np.testing.assert_allclose(final_latents(engines), expected, rtol=NEAREST, atol=NEAREST)
    everywhere = by_hand(pipe, latents, lambda index: index in guided)
    assert np.abs(expected - everywhere).max() > 10 * NEAREST, "a forecast is not the denoiser's output"


def test_steps_previews_and_pictures_are_as_always(pipeline: DiffusionPipeline) -> None:
    """Each picture begins anew, and the note counts the calls that all of them did without."""
    engines = fakes()
    request = ImageRequest("ab", steps=8, seed=5, images=2, preview_every=3, forecast="every 3 after 2")
    events = list(drive(pipeline(request), engines))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.step, event.total) for event in progress] == [(step, 16) for step in range(1, 17)]
    assert [event.step for event in progress if event.preview is not None] == [3, 6, 11, 14]
    assert len(engines["unet"].calls) == 8, "of 8 steps the first, second, fifth and last"
    assert [event.text for event in events if isinstance(event, Note)] == [
        "in 8 of 16 steps the UNet's output was forecast"
    ]
    _, second = [event for event in events if isinstance(event, ImageReady)]
    (alone,) = pictures(pipeline, ImageRequest("ab", steps=8, seed=6, forecast="1,2,5,8"))
    np.testing.assert_array_equal(second.image, alone.image)


def test_none_is_every_step(pipeline: DiffusionPipeline) -> None:
    plain = list(drive(pipeline(ImageRequest("ab", seed=0)), fakes()))
    none = list(drive(pipeline(ImageRequest("ab", seed=0, forecast="none")), fakes()))
    assert not [event for event in none if isinstance(event, Note)] and len(plain) == len(none)
    assert isinstance(plain[-1], ImageReady) and isinstance(none[-1], ImageReady)
    np.testing.assert_array_equal(plain[-1].image, none[-1].image)


def test_a_prompt_that_has_no_output_yet_is_computed(pipeline: DiffusionPipeline) -> None:
    """Guidance begins in a step that leaves the denoiser out: there is nothing to continue of the negative prompt."""
    engines = fakes()
    pictures(pipeline, ImageRequest("ab", steps=4, seed=0, guidance_start=0.5, forecast="1,2"), engines)
    assert [len(call["sample"]) for call in engines["unet"].calls] == [1, 1, 2]


def test_what_is_stored_is_drawn_where_it_fits(tokenizer: Path, pipeline: DiffusionPipeline) -> None:
    stored = {"forecast": {"forecast": "every 3 after 2", "sampler": "ddim", "steps": 8}}
    able, engines = DiffusionPipeline(DiffusionConfig.parse(CONFIG | stored), tokenizer), fakes()
    pictures(able, ImageRequest("ab", steps=8, seed=0, forecast="stored"), engines)
    assert len(engines["unet"].calls) == 4
    with pytest.raises(InvalidInput, match="forecast: stored is of 8 steps of ddim, and these are 4 of ddim: draw so"):
        able(ImageRequest("ab", forecast="stored"))
    with pytest.raises(InvalidInput, match="forecast: is stored, and nothing is stored in this bundle: choose it with"):
        pipeline(ImageRequest("ab", forecast="stored"))
    assert "forecast" in able.config.dump() and "forecast" not in pipeline.config.dump()


@pytest.mark.parametrize("forecast", ["", "every 2", "2-4", "1,5", "1,heun"])
def test_a_bad_forecast_is_refused_before_any_work(pipeline: DiffusionPipeline, forecast: str) -> None:
    if forecast == "":
        assert pipeline(ImageRequest("ab", forecast=forecast)), "an empty field of a message is none"
        return
    with pytest.raises(InvalidInput) as caught:
        pipeline(ImageRequest("ab", forecast=forecast))
    assert caught.value.field == "forecast"


def test_samplers_that_evaluate_twice_refuse_a_forecast(pipeline: DiffusionPipeline) -> None:
    with pytest.raises(InvalidInput, match="forecast: leaves out step 3, in which heun evaluates the model more than"):
        pipeline(ImageRequest("ab", sampler="heun", forecast="1,2"))


def test_a_server_counts_the_calls_that_were_made_and_stops_between_forecasts(pipeline: DiffusionPipeline) -> None:
    request = ImageRequest("ab", steps=8, seed=5, forecast="1,2")
    engines: Any = fakes()
    for name, engine in engines.items():
        engine.submodel = SimpleNamespace(name=name, precision="float32")
    model: Any = SimpleNamespace(engines=engines, notes=("a note of the model",))
    *_, done = Job(model, pipeline(request)).events()
    assert isinstance(done, Done)
    assert {use.submodel: use.calls for use in done.engines} == {"text_encoder": 1, "unet": 2, "vae_decoder": 1}
    assert done.notes == ("a note of the model", "in 6 of 8 steps the UNet's output was forecast")
    job = Job(model, pipeline(request))
    events = job.events()
    with pytest.raises(Cancelled):
        for event in events:
            if isinstance(event, Progress):
                assert event.step <= 4
            if isinstance(event, Progress) and event.step == 4:
                job.stop(Cancelled("enough"))
