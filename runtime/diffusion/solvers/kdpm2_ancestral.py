"""DPM-Solver-2 to a lower noise level than the next point's, then fresh noise up to it (Crowson's k-diffusion,
sample_dpm_2_ancestral). Equals diffusers' KDPM2AncestralDiscreteScheduler 0.42.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule, along, ancestral
from runtime.diffusion.scheduling import between, exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.solvers.kdpm2 import midpoint, whole_karras
from runtime.diffusion.spacing import USUAL


def kdpm2_ancestral(schedule: Schedule, x: Latents, fresh: Noise, middles: Sequence[Point]) -> Steps:
    """One draw of fresh noise at the end of every step but the last. `middles` are the points halfway down."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        if index < len(middles):
            down, up = ancestral(now, after)
            x = (yield from midpoint(x, clean, now, middles[index], down)) + up * fresh()
        else:
            x = along(x, clean, now, after.alpha, after.sigma)
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    schedule = exploding(fields, steps, options)
    downs = [ancestral(schedule.point(index), schedule.point(index + 1))[0] for index in range(steps - 1)]
    middles = between(fields, np.sqrt(schedule.sigma[:-2] * downs))
    return Sampler(whole_karras(schedule, options), partial(kdpm2_ancestral, middles=middles))


SOLVER = Solver(prepare, USUAL)
