"""Trajectory consistency distillation: Zheng et al. 2024, algorithm 4 (arXiv 2402.19159). Equals diffusers'
TCDScheduler 0.42.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Floats, Latents, Schedule
from runtime.diffusion.scheduling import at_timesteps
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.solvers.lcm import distilled
from runtime.diffusion.training import alphas_cumprod


def tcd(schedule: Schedule, x: Latents, fresh: Noise, lows: Floats | None = None) -> Steps:
    """To less noise than the next point has, and up to it with fresh noise; in the last step straight to its end.

    `lows` are the signal shares ᾱ to go to, float64 [n]; without them every step goes straight to the next point.
    """
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, noise = yield x, now
        if lows is None or index == len(schedule) - 1:
            x = after.alpha * clean + after.sigma * noise
        else:
            low = float(lows[index])
            kept = after.alpha**2 / low
            down = math.sqrt(low) * clean + math.sqrt(1 - low) * noise
            x = math.sqrt(kept) * down + math.sqrt(1 - kept) * fresh()
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    """`eta` 0 is deterministic, 1 goes down to no noise in every step, as LCM does. Clean latents are not clipped."""
    timesteps = distilled(fields, steps)
    table = alphas_cumprod(fields).astype(np.float64)
    schedule = replace(at_timesteps(fields, timesteps, float(table[0])), clip=math.inf)
    following = np.append(timesteps[1:], 0).astype(np.float32)
    lows = table[np.floor(np.float32(1 - options.eta) * following).astype(np.int64)]
    return Sampler(schedule, partial(tcd, lows=lows if options.eta else None))


SOLVER = Solver(prepare, eta=True)
