"""DEIS: Zhang and Chen 2022, the rhoAB kind in the logarithm of the noise level (arXiv 2204.13902, section 4). Equals
diffusers' DEISMultistepScheduler 0.42.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule, lagrange_integrals, weighted
from runtime.diffusion.scheduling import preserving
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.solvers.dpmpp_2m import order_of
from runtime.diffusion.spacing import USUAL


def deis(schedule: Schedule, x: Latents, fresh: Noise, most: int = 2, lower_order_final: bool = True) -> Steps:
    """Integrate the polynomial, in the logarithm of the noise level, through the last `most` estimates of the noise."""
    logs: list[float] = []
    noises: list[Latents] = []
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        _, noise = yield x, now
        logs, noises = [math.log(now.level), *logs[: most - 1]], [noise, *noises[: most - 1]]
        order = order_of(schedule, index, most, lower_order_final)
        weights = lagrange_integrals(logs[:order], logs[0], math.log(after.level), np.exp)
        x = after.alpha / now.alpha * x + after.alpha * weighted(weights, noises[:order])
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    solve = partial(deis, most=fields.solver_order, lower_order_final=fields.lower_order_final)
    return Sampler(preserving(fields, steps, options), solve)


SOLVER = Solver(prepare, USUAL)
