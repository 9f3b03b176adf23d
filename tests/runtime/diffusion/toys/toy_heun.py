"""Heun's method: two evaluations in every step but the last (Karras et al. 2022, algorithm 1; arXiv 2206.00364)."""

from __future__ import annotations

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.solvers import euler


def heun(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Along the mean of the directions at both ends of a step."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, noise = yield x, now
        ahead = after.alpha * clean + after.sigma * noise
        if after.sigma:
            clean_ahead, noise_ahead = yield ahead, after
            ahead = after.alpha * (clean + clean_ahead) / 2 + after.sigma * (noise + noise_ahead) / 2
        x = ahead
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    return Sampler(euler.prepare(fields, steps, options).schedule, heun)


SOLVER = Solver(prepare)
