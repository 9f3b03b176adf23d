"""Euler's method to a lower noise level than the next point's, then fresh noise up to it (Crowson's k-diffusion,
sample_euler_ancestral). Equals diffusers' EulerAncestralDiscreteScheduler 0.42.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.solvers.euler import exploding
from runtime.diffusion.spacing import spaced, trained_on
from runtime.diffusion.training import noise_levels


def euler_ancestral(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Down to sigma times the share of noise that a step keeps, then up."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        kept = after.sigma * now.alpha / (now.sigma * after.alpha)
        up, down = after.sigma * math.sqrt(1 - kept**2), after.sigma * kept  # up² + down² = sigma²
        x = after.alpha * clean + down / now.sigma * (x - now.alpha * clean) + up * fresh()
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    """Noise levels interpolated between those of training, then none."""
    spacing = fields.timestep_spacing or "linspace"
    timesteps = trained_on(spaced(fields, spacing, steps), fields)
    table = noise_levels(fields)
    levels = np.append(np.interp(timesteps, np.arange(len(table)), table), 0.0)
    return Sampler(exploding(fields, spacing, timesteps, levels), euler_ancestral)


SOLVER = Solver(prepare)
