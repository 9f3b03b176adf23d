"""Schedules as arrays: the three kinds meet at the same solvers, and flow matching equals diffusers'."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from runtime.diffusion.schedule import PREDICTIONS, Schedule, flow_matching, variance_preserving
from runtime.diffusion.solver import Sampler, Steps, Walk
from runtime.diffusion.solvers.ddim import ddim
from runtime.diffusion.solvers.dpmpp_2m import dpmpp_2m
from runtime.diffusion.solvers.euler import euler
from runtime.diffusion.solvers.euler_ancestral import euler_ancestral

SHAPE = (2, 4, 3, 5)


def predicted(kind: str, clean: np.ndarray, noise: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """What a perfect model of that kind gives for alpha clean + sigma noise."""
    outputs: dict[str, np.ndarray] = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
        "flow_prediction": noise - clean,
    }
    return outputs[kind]


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_estimate_finds_both_parts_of_the_latents(kind: str, scale: float) -> None:
    """Whatever the scale of the latents, the model gets those it was trained on."""
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    alpha, sigma = (0.4, 0.6) if kind == "flow_prediction" else (0.6, 0.8)
    schedule = Schedule(np.array([alpha, 1]) * scale, np.array([sigma, 0]) * scale, np.ones(1, np.float32), kind)
    x = np.asarray(scale * (alpha * clean + sigma * noise), np.float32)
    point = schedule.point(0)
    np.testing.assert_allclose(schedule.model_input(x, point), alpha * clean + sigma * noise, atol=1e-6)
    found = schedule.estimate(x, predicted(kind, clean, noise, alpha, sigma), point)
    np.testing.assert_allclose(found.clean, clean, atol=1e-5)
    np.testing.assert_allclose(found.noise, noise, atol=1e-5)


def test_clean_latents_are_clipped_and_noise_is_not() -> None:
    schedule = Schedule(np.array([0.6, 1]), np.array([0.8, 0]), np.ones(1, np.float32), clip=0.5)
    x = np.full(SHAPE, 2, np.float32)
    clean, noise = schedule.estimate(x, x, schedule.point(0))
    assert (clean == 0.5).all() and (noise == 2).all()


@pytest.mark.parametrize("solve", [ddim, dpmpp_2m, euler, euler_ancestral])
def test_every_solver_walks_every_kind_of_schedule(solve: Callable[..., Steps]) -> None:
    """A model that knows the clean latents leads to them, also from pure noise, where flow matching has no signal."""
    rng = np.random.default_rng(1)
    clean, start = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    levels, time = np.array([9.0, 3.0, 1.0, 0.0]), np.arange(3, dtype=np.float32)[::-1]
    for schedule in (
        Schedule(*variance_preserving(levels), time, "sample"),
        Schedule(np.ones(4), levels, time, "sample", start=9.0),
        flow_matching(3),
    ):
        walk = Walk(Sampler(schedule, solve), start, lambda: rng.standard_normal(SHAPE, np.float32))
        while walk.latents is None:
            x, point = walk.x, schedule.point(walk.step)
            flow = (x - clean) / np.float32(point.sigma)
            walk.advance(flow if schedule.prediction == "flow_prediction" else clean)
        np.testing.assert_allclose(walk.latents, clean, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
def test_flow_matching_equals_diffusers(shift: float, steps: int) -> None:
    """Sigmas, timesteps and the latents of Euler's method, as FlowMatchEulerDiscreteScheduler has them."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = flow_matching(steps, shift=shift)
    np.testing.assert_allclose(schedule.sigma, scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(schedule.time, scheduler.timesteps.numpy(), atol=1e-3)
    start = np.random.default_rng(steps).standard_normal(SHAPE, dtype=np.float32)

    def model(x: np.ndarray, time: float) -> np.ndarray:
        return (np.tanh(x + 0.3) * np.float32(math.cos(time / 300)) + 0.1 * x[:, ::-1]).astype(np.float32)

    expected = torch.from_numpy(start)
    for timestep in scheduler.timesteps:
        output = torch.from_numpy(model(expected.numpy(), float(timestep)))
        expected = scheduler.step(output, timestep, expected).prev_sample
    walk = Walk(Sampler(schedule, euler), start, lambda: start)
    while walk.latents is None:
        walk.advance(model(walk.x, walk.time))
    np.testing.assert_allclose(walk.latents, expected.numpy(), atol=1e-5)
