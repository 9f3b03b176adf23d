"""DDPM: Ho, Jain and Abbeel 2020, formulas (6) and (7) (arXiv 2006.11239). Equals diffusers' DDPMScheduler 0.42."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule
from runtime.diffusion.scheduling import at_timesteps
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import spaced, trained_on

LEAST_VARIANCE = 1e-20
LARGE = ("fixed_large", "fixed_large_log")


def ddpm(schedule: Schedule, x: Latents, fresh: Noise, large: bool = False) -> Steps:
    """The mean of the posterior of the next point's latents, given the clean ones, and noise of its variance.

    With `large` the variance is that of the forward step, the upper bound in the paper; else the lower one.
    """
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        signal = now.alpha / after.alpha
        beta, kept = 1 - signal**2, (after.sigma / now.sigma) ** 2
        x = after.alpha * beta / now.sigma**2 * clean + signal * kept * x
        if now.time > 0:
            x = x + math.sqrt(beta if large else max(kept * beta, LEAST_VARIANCE)) * fresh()
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    timesteps = trained_on(np.round(spaced(fields, fields.timestep_spacing, steps)), fields)
    return Sampler(at_timesteps(fields, timesteps), partial(ddpm, large=fields.variance_type in LARGE))


SOLVER = Solver(prepare)
