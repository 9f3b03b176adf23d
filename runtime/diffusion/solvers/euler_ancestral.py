"""Euler's method to a lower noise level than the next point's, then fresh noise up to it (Crowson's k-diffusion,
sample_euler_ancestral). Equals diffusers' EulerAncestralDiscreteScheduler 0.42.
"""

from __future__ import annotations

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule, along, ancestral
from runtime.diffusion.scheduling import exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps


def euler_ancestral(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Down to sigma times the share of noise that a step keeps, then up."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        down, up = ancestral(now, after)
        x = along(x, clean, now, after.alpha, down) + up * fresh()
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    return Sampler(exploding(fields, steps, options), euler_ancestral)


SOLVER = Solver(prepare)
