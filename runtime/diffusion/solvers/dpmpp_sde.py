"""DPM-Solver++ on the stochastic equation, two evaluations in every step but the last (Crowson's k-diffusion,
sample_dpmpp_sde). Equals diffusers' DPMSolverSDEScheduler 0.42 on the same increments of Brownian motion.

diffusers draws these increments from a tree (torchsde's BrownianInterval, seeded apart from the request), so that they
do not depend on the steps. Here they are the request's own noise: in every step but the last two draws, for the way to
the middle and from there to the end. The increment of the whole step is the sum of both, as it must be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule, along, ancestral
from runtime.diffusion.scheduling import between, exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL


def dpmpp_sde(schedule: Schedule, x: Latents, fresh: Noise, middles: Sequence[Point]) -> Steps:
    """An ancestral step to the middle, and one from the beginning to the end with the estimate made there."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        down, up = ancestral(now, after)
        noise: Latents | float = 0.0
        if index < len(middles):
            middle = middles[index]
            first, second = fresh(), fresh()
            middle_down, middle_up = ancestral(now, middle)
            clean, _ = yield along(x, clean, now, middle.alpha, middle_down) + middle_up * first, middle
            share = (now.sigma - middle.sigma) / (now.sigma - after.sigma)
            noise = math.sqrt(share) * first + math.sqrt(1 - share) * second
        x = along(x, clean, now, after.alpha, down) + up * noise
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    schedule = exploding(fields, steps, options)
    middles = between(fields, np.sqrt(schedule.sigma[:-2] * schedule.sigma[1:-1]))
    return Sampler(schedule, partial(dpmpp_sde, middles=middles))


SOLVER = Solver(prepare, USUAL)
