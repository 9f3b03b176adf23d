"""DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2; arXiv 2211.01095). Equals diffusers'
DPMSolverMultistepScheduler 0.42.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Final

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Floats, Latents, Point, Schedule, variance_preserving
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import falling, final_level, karras, spaced, timesteps_of, trained_on
from runtime.diffusion.training import Table, noise_levels

FEW_STEPS: Final = 15
"""Below this many steps the last one is of first order, for stability (`lower_order_final`)."""


def dpmpp_2m(schedule: Schedule, x: Latents, fresh: Noise, lower_order_final: bool = True) -> Steps:
    """Extrapolate from the last two estimates of the clean latents."""
    previous: Latents | None = None
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        target = clean
        if previous is not None and not _first_order(schedule, index, lower_order_final):
            step, last = _lambda(after) - _lambda(now), _lambda(now) - _lambda(schedule.point(index - 1))
            target = clean + 0.5 * step / last * (clean - previous)
        shrink = after.sigma * now.alpha / (now.sigma * after.alpha)  # e^-h, where h is the step in lambda
        x = after.sigma / now.sigma * x + after.alpha * (1 - shrink) * target
        previous = clean
    return x


def _first_order(schedule: Schedule, index: int, lower_order_final: bool) -> bool:
    steps = len(schedule)
    to_zero = schedule.point(steps).sigma == 0  # there lambda is infinite and a second order step undefined
    return index == steps - 1 and (to_zero or (lower_order_final and steps < FEW_STEPS))


def _lambda(point: Point) -> float:
    """The log of signal over noise."""
    return math.log(point.alpha / point.sigma) if point.alpha else -math.inf


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    """Noise levels of whole timesteps of training, or evenly spaced in their seventh root."""
    table = noise_levels(fields)
    timesteps, levels = (_karras if options.karras else _of_training)(fields, steps, table)
    alpha, sigma = variance_preserving(falling(np.append(levels, final_level(fields, table))))
    schedule = Schedule(alpha, sigma, timesteps.astype(np.float32), fields.prediction_type)
    return Sampler(schedule, partial(dpmpp_2m, lower_order_final=fields.lower_order_final))


def _karras(fields: SchedulerFields, steps: int, table: Table) -> tuple[Floats, Floats]:
    levels = karras(table[-1], table[0], steps)
    timesteps = timesteps_of(levels, table)
    # diffusers rounds, except on the cosine schedule, where it truncates
    return np.floor(timesteps) if fields.beta_schedule == "squaredcos_cap_v2" else np.round(timesteps), levels


def _of_training(fields: SchedulerFields, steps: int, table: Table) -> tuple[Floats, Floats]:
    spacing = fields.timestep_spacing or "linspace"
    beyond = 0 if spacing == "trailing" else 1
    cut = int((np.log(table) > -fields.lambda_min_clipped).sum())
    timesteps = trained_on(np.round(spaced(fields, spacing, steps, beyond=beyond, cut=cut)), fields)
    return timesteps, table[timesteps.astype(np.int64)].astype(np.float64)


SOLVER = Solver(prepare, karras=True)
