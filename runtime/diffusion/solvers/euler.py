"""Euler's method on dx/ds = (x - x₀)/s, where x = x₀ + sε (Karras et al. 2022, algorithm 1 without churn; arXiv
2206.00364). Equals diffusers' EulerDiscreteScheduler and, on a flow matching schedule, FlowMatchEulerDiscreteScheduler,
both 0.42.
"""

from __future__ import annotations

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule, along
from runtime.diffusion.scheduling import exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL


def euler(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Straight on along the direction of the noise."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        x = along(x, clean, now, after.alpha, after.sigma)
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    return Sampler(exploding(fields, steps, options), euler)


SOLVER = Solver(prepare, USUAL)
