"""Spacings: which timesteps or noise levels of a model's training a schedule of few steps takes."""

from __future__ import annotations

import math
from typing import Final, cast

import numpy as np

from runtime.diffusion.published import SchedulerFields, Spacing
from runtime.diffusion.schedule import Floats
from runtime.diffusion.training import Table
from runtime.errors import InvalidInput

KARRAS_RHO: Final = 7.0
ROUNDING: Final = 1e-6
"""Noise levels nearer than this, relative to themselves, are one: they come from float32 tables."""


def spaced(fields: SchedulerFields, spacing: Spacing, steps: int, *, beyond: int = 0, cut: int = 0) -> Floats:
    """Timesteps from noise to clean, float64 [steps], spaced as in table 2 of Lin et al. 2023 (arXiv 2305.08891).

    With `beyond` 1 the range is cut for one step more, and its clean end left out: what DPM-Solver++ does. The last
    `cut` timesteps of training are left out; with trailing there are fewer steps then.
    """
    total = fields.num_train_timesteps
    match spacing:
        case "linspace":
            return np.linspace(0, total - cut - 1, steps + beyond)[::-1][:steps]
        case "leading":
            ratio = (total - cut) // (steps + beyond)
            return (np.arange(steps + beyond, dtype=np.float64) * ratio)[::-1][:steps] + fields.steps_offset
        case "trailing":  # for some counts arange comes out one too long
            return np.round(np.arange(total - cut, 0, -total / steps)[:steps]) - 1


def trained_on(timesteps: Floats, fields: SchedulerFields) -> Floats:
    """The same timesteps, if the model was trained on all of them and no two are equal. Raises InvalidInput naming
    `steps`.
    """
    last, steps = fields.num_train_timesteps - 1, len(timesteps)
    if not steps:
        raise InvalidInput(
            "steps", "the model's schedule (lambda_min_clipped) leaves none of so few steps. Use more steps"
        )
    if timesteps[0] > last or timesteps[-1] < 0 or not (np.diff(timesteps) < 0).all():
        raise InvalidInput(
            "steps",
            f"{steps} steps do not fit the model's schedule of timesteps 0 to {last}"
            f" (steps_offset {fields.steps_offset}): some would repeat or lie outside. Use fewer steps",
        )
    return timesteps


def karras(first: float, last: float, steps: int) -> Floats:
    """Noise levels evenly spaced in their seventh root, float64 [steps] (Karras et al. 2022, equation 5; arXiv
    2206.00364).
    """
    ramp = np.linspace(0, 1, steps)
    high, low = float(first) ** (1 / KARRAS_RHO), float(last) ** (1 / KARRAS_RHO)  # a float32 would stay one
    return cast(Floats, (high + ramp * (low - high)) ** KARRAS_RHO)


def timesteps_of(levels: Floats, table: Table) -> Floats:
    """The timesteps at which the training has these noise levels, interpolated in their logarithm."""
    logs, wanted = np.log(table), np.log(levels)
    # the last entry not above the wanted level: a zero-SNR table drops at its very end, so the search is in its minimum
    # from there on
    low = np.searchsorted(np.minimum.accumulate(logs[::-1])[::-1], wanted, side="right").clip(1, len(logs) - 1) - 1
    return cast(Floats, low + ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clip(0, 1))


def falling(levels: Floats) -> Floats:
    """The same noise levels (noise over signal), float64 [steps + 1], if each is below the one before. Raises
    InvalidInput naming `steps`.

    The last may equal the one before: a schedule that ends at the least noise of training often reaches it one step
    early, up to rounding.
    """
    if math.isclose(levels[-1], levels[-2], rel_tol=ROUNDING):
        levels = np.append(levels[:-1], levels[-2])
    falls = np.diff(levels)
    if (falls > 0).any() or (falls[:-1] == 0).any():
        raise InvalidInput(
            "steps", f"{len(falls)} steps are too close together for the model's noise schedule. Use fewer steps"
        )
    return levels


def final_level(fields: SchedulerFields, table: Table) -> float:
    """The noise level after the last step."""
    return float(table[0]) if fields.final_sigmas_type == "sigma_min" else 0.0
