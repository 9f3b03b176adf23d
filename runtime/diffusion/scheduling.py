"""The schedules of diffusers' scheduler classes, of three kinds, from a published file and a number of steps.

`exploding` and `preserving` walk along noise levels, `at_timesteps` along whole timesteps of training.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Floats, Point, Schedule, variance_preserving
from runtime.diffusion.solver import Options
from runtime.diffusion.spacing import SPACINGS, falling, final_level, spaced, timesteps_of, trained_on
from runtime.diffusion.training import Table, alphas_cumprod, noise_levels
from runtime.errors import InvalidInput

WHOLE: Final = ("karras", "lu")
"""Spacings whose timesteps are rounded. Those of the others are truncated."""


def exploding(fields: SchedulerFields, steps: int, options: Options) -> Schedule:
    """Noise levels interpolated between those of training, or spaced anew between their ends; alpha is 1. Raises
    InvalidInput naming `steps`.
    """
    timesteps = trained_on(spaced(fields, fields.timestep_spacing, steps), fields)
    table = noise_levels(fields)
    levels = np.append(np.interp(timesteps, np.arange(len(table)), table), final_level(fields, table))
    first, last = levels[0], levels[-2]
    if fields.interpolation_type == "log_linear":
        first, last = table[-1], table[0]
        levels = np.geomspace(first, last, steps + 1, dtype=np.float64)
    if options.spacing:
        levels = np.append(SPACINGS[options.spacing](first, last, steps), final_level(fields, table))
        timesteps = timesteps_of(levels[:-1], table)
    signal = 1 / (1 + falling(levels) ** 2)
    levels = np.sqrt(
        (1 - signal) / signal
    )  # off by a last bit, which decides ties of float32: seeds keep their pictures
    start = math.hypot(levels[0], 1.0) if fields.timestep_spacing == "leading" else float(levels[0])
    return Schedule(
        np.ones_like(levels), levels, timesteps.astype(np.float32), fields.prediction_type, start, clip_of(fields)
    )


def between(fields: SchedulerFields, levels: Floats) -> list[Point]:
    """Points of an exploding schedule with these noise levels, float64 [n], one in each step from the first on."""
    times = timesteps_of(levels, noise_levels(fields))
    return [Point(1.0, float(levels[step]), float(times[step]), step) for step in range(len(levels))]


def preserving(fields: SchedulerFields, steps: int, options: Options, *, truncate_cosine: bool = False) -> Schedule:
    """Noise levels of whole timesteps of training, or spaced anew between its ends; alpha² + sigma² is 1. Raises
    InvalidInput naming `steps`.

    Of spaced levels the model receives the rounded or truncated timesteps. `truncate_cosine` truncates all those of the
    cosine schedule.
    """
    table = noise_levels(fields)
    if options.spacing:
        levels = SPACINGS[options.spacing](table[-1], table[0], steps)
        truncated = options.spacing not in WHOLE or (truncate_cosine and fields.beta_schedule == "squaredcos_cap_v2")
        timesteps = (np.floor if truncated else np.round)(timesteps_of(levels, table))
    else:
        timesteps, levels = _of_training(fields, steps, table)
    alpha, sigma = variance_preserving(falling(np.append(levels, final_level(fields, table))))
    return Schedule(alpha, sigma, timesteps.astype(np.float32), fields.prediction_type, clip=clip_of(fields))


def _of_training(fields: SchedulerFields, steps: int, table: Table) -> tuple[Floats, Floats]:
    beyond = 0 if fields.timestep_spacing == "trailing" else 1
    cut = int((np.log(table) > -fields.lambda_min_clipped).sum())
    timesteps = trained_on(np.round(spaced(fields, fields.timestep_spacing, steps, beyond=beyond, cut=cut)), fields)
    return timesteps, table[timesteps.astype(np.int64)].astype(np.float64)


def at_timesteps(fields: SchedulerFields, timesteps: Floats, final: float = 1.0) -> Schedule:
    """The noise of training at these whole timesteps, float64 [n]; `final` is the signal share ᾱ after the last step.

    Raises InvalidInput naming `sampler` where the first has no signal and the model predicts noise.
    """
    signal = np.append(alphas_cumprod(fields)[timesteps.astype(np.int64)].astype(np.float64), final)
    if fields.prediction_type == "epsilon" and signal[0] == 0:
        raise InvalidInput(
            "sampler",
            "it cannot start from pure noise (rescale_betas_zero_snr) where the model predicts noise: use euler",
        )
    return Schedule(
        np.sqrt(signal),
        np.sqrt(1 - signal),
        timesteps.astype(np.float32),
        fields.prediction_type,
        clip=clip_of(fields),
    )


def strided(fields: SchedulerFields, steps: int) -> tuple[Schedule, tuple[Floats, Floats]]:
    """A schedule at whole timesteps, and alpha and sigma after each step, float64 [n]: each ends a whole stride of
    training timesteps further, which with some spacings is not quite where the next one begins.
    """
    timesteps = trained_on(np.round(spaced(fields, fields.timestep_spacing, steps)), fields)
    table = alphas_cumprod(fields).astype(np.float64)
    before = timesteps.astype(np.int64) - fields.num_train_timesteps // steps
    after = np.where(before >= 0, table[before.clip(0)], 1.0 if fields.set_alpha_to_one else table[0])
    return at_timesteps(fields, timesteps, float(after[-1])), (np.sqrt(after), np.sqrt(1 - after))


def clip_of(fields: SchedulerFields) -> float:
    """The bound of estimated clean latents."""
    return fields.clip_sample_range if fields.clip_sample else math.inf
