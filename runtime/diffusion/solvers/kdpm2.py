"""DPM-Solver-2 (Lu et al. 2022, algorithm 1; arXiv 2206.00927) as in Crowson's k-diffusion (sample_dpm_2): the midpoint
method, the middle taken in the logarithm of the noise level. Equals diffusers' KDPM2DiscreteScheduler 0.42.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule, along
from runtime.diffusion.scheduling import between, exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL


def kdpm2(schedule: Schedule, x: Latents, fresh: Noise, middles: Sequence[Point]) -> Steps:
    """Along the direction at the middle of a step. `middles` are those points, of every step but the last."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        if index < len(middles):
            x = yield from midpoint(x, clean, now, middles[index], after.sigma)
        else:
            x = along(x, clean, now, after.alpha, after.sigma)
    return x


def midpoint(x: Latents, clean: Latents, now: Point, middle: Point, sigma: float) -> Steps:
    """From the point `now`, where the clean latents are `clean`, to that sigma, along the direction at the middle."""
    halfway = along(x, clean, now, middle.alpha, middle.sigma)
    clean, _ = yield halfway, middle
    noise: Latents = halfway - middle.alpha * clean
    return x + (sigma - now.sigma) / middle.sigma * noise


def whole_karras(schedule: Schedule, options: Options) -> Schedule:
    """The schedule with rounded timesteps where its spacing is that of Karras et al., as diffusers has it."""
    return replace(schedule, time=np.round(schedule.time)) if options.spacing == "karras" else schedule


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    schedule = exploding(fields, steps, options)
    middles = between(fields, np.sqrt(schedule.sigma[:-2] * schedule.sigma[1:-1]))
    return Sampler(whole_karras(schedule, options), partial(kdpm2, middles=middles))


SOLVER = Solver(prepare, USUAL)
