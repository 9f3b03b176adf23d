"""Euler's method on dx/ds = (x - x₀)/s, where x = x₀ + sε (Karras et al. 2022, algorithm 1 without churn; arXiv
2206.00364). Equals diffusers' EulerDiscreteScheduler and, on a flow matching schedule, FlowMatchEulerDiscreteScheduler,
both 0.42.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.diffusion.published import SchedulerFields, Spacing
from runtime.diffusion.schedule import Floats, Latents, Schedule
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import falling, final_level, karras, spaced, timesteps_of, trained_on
from runtime.diffusion.training import noise_levels


def euler(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Straight on along the direction of the noise."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        noise: Latents = x - now.alpha * clean
        x = after.alpha * clean + after.sigma / now.sigma * noise
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    """Noise levels interpolated between those of training."""
    spacing = fields.timestep_spacing or "linspace"
    timesteps = trained_on(spaced(fields, spacing, steps), fields)
    table = noise_levels(fields)
    levels = np.append(np.interp(timesteps, np.arange(len(table)), table), final_level(fields, table))
    first, last = levels[0], levels[-2]
    if fields.interpolation_type == "log_linear":
        first, last = table[-1], table[0]
        levels = np.geomspace(first, last, steps + 1, dtype=np.float64)
    if options.karras:
        levels = np.append(karras(first, last, steps), final_level(fields, table))
        timesteps = timesteps_of(levels[:-1], table)
    return Sampler(exploding(fields, spacing, timesteps, levels), euler)


def exploding(fields: SchedulerFields, spacing: Spacing, timesteps: Floats, levels: Floats) -> Schedule:
    """The variance exploding schedule over these noise levels, float64 [n + 1]. Raises InvalidInput naming `steps`."""
    signal = 1 / (1 + falling(levels) ** 2)
    levels = np.sqrt(
        (1 - signal) / signal
    )  # off by a last bit, which decides ties of float32: seeds keep their pictures
    start = math.hypot(levels[0], 1.0) if spacing == "leading" else float(levels[0])
    return Schedule(np.ones_like(levels), levels, timesteps.astype(np.float32), fields.prediction_type, start)


SOLVER = Solver(prepare, karras=True)
