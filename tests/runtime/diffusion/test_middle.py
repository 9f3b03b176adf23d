"""Image to image begins in the middle of a schedule: the same steps, latents and result as in diffusers' pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.diffusion.solver import Walk, make_sampler, samplers
from runtime.errors import InvalidInput
from tests.runtime.diffusion.reference import WITH_ETA, feed, split
from tests.runtime.diffusion.test_samplers import SD15, SHAPE, TOLERANCE, difference, model, noises, published, ready

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning")


def theirs(scheduler: Any, steps: int, strength: float) -> Any:
    """The timesteps that diffusers' pipeline takes."""
    pipeline = SimpleNamespace(scheduler=scheduler)
    return diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")[0]


@pytest.mark.parametrize(("steps", "strength"), [(12, 0.1), (17, 0.75), (6, 1.0)])
@pytest.mark.parametrize("name", samplers())
def test_equals_diffusers(name: str, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if split(name)[0] in UNLIKE and strength < 1:
        pytest.skip("diffusers' own pipeline goes wrong with this class")
    scheduler = ready(name, SD15, steps)
    timesteps = theirs(scheduler, steps, strength)
    sampler = make_sampler(name, published(name, SD15), steps).strengthened(strength)
    schedule = sampler.schedule
    assert schedule.time[schedule.first] == pytest.approx(float(timesteps[0]), abs=1 if "_" in name else 2e-3)

    noise = noises(steps, steps)
    clean = np.random.default_rng(steps).standard_normal(SHAPE, dtype=np.float32)
    latents = scheduler.add_noise(torch.from_numpy(clean), torch.from_numpy(noise[0]), timesteps[:1])
    np.testing.assert_allclose(schedule.noised(clean, noise[0]), latents.numpy(), rtol=1e-5, atol=5e-6)

    stream, again, times = iter(noise[1:]), iter(noise[1:]), []
    walk = Walk(sampler, noise[0], lambda: next(stream), clean)
    while walk.latents is None:
        times.append(walk.time)
        walk.advance(model(walk.x, walk.time))
    feed(name, lambda: torch.from_numpy(next(again)), monkeypatch)
    for timestep, time in zip(timesteps, times, strict=True):
        output = torch.from_numpy(model(scheduler.scale_model_input(latents, timestep).numpy(), time))
        eta = {"eta": 0.0} if name in WITH_ETA else {}
        latents = scheduler.step(output, timestep, latents, **eta).prev_sample.float()
    assert walk.step == len(schedule.steps) == int(steps * strength)
    assert difference(walk.latents, latents.numpy()) <= TOLERANCE


UNLIKE = {"pndm", "lms"}
"""PNDM's first timestep, which comes twice, is counted as a step, so that the latents of one are taken for those of the
next; LMS takes the weights of as many estimates as there would be from the beginning on.
"""


@pytest.mark.parametrize("name", samplers())
def test_no_strength_keeps_the_latents(name: str) -> None:
    clean = np.ones(SHAPE, np.float32)
    walk = Walk(make_sampler(name, published(name, SD15), 4).strengthened(0), clean, lambda: clean, 3 * clean)
    assert walk.step == 0 and walk.latents is not None
    np.testing.assert_array_equal(walk.latents, 3 * clean)


def test_a_strength_below_one_step_is_refused() -> None:
    sampler = make_sampler("ddim", published("ddim", SD15), 10)
    with pytest.raises(InvalidInput, match=r"strength: is 0.09, which is less than one of 10 steps.*at least 0.1;"):
        sampler.strengthened(0.09)
