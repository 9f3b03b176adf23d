"""Heun's method: two evaluations in every step but the last (Karras et al. 2022, algorithm 1 without churn; arXiv
2206.00364). Equals diffusers' HeunDiscreteScheduler 0.42.
"""

from __future__ import annotations

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule, along
from runtime.diffusion.scheduling import exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL


def heun(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Along the mean of the directions at both ends of a step."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        ahead = along(x, clean, now, after.alpha, after.sigma)
        if after.sigma:
            clean_ahead, _ = yield ahead, after._replace(step=index)
            noises = noise_of(x, clean, now) + noise_of(ahead, clean_ahead, after)
            half_alpha, half_sigma = (after.alpha - now.alpha) / 2, (after.sigma - now.sigma) / 2
            ahead = x + half_alpha * (clean + clean_ahead) + half_sigma * noises
        x = ahead
    return x


def noise_of(x: Latents, clean: Latents, point: Point) -> Latents:
    """The noise beside these clean latents in x: not the model's where they were clipped."""
    noise: Latents = x - point.alpha * clean
    return noise / point.sigma


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    return Sampler(exploding(fields, steps, options), heun)


SOLVER = Solver(prepare, USUAL)
