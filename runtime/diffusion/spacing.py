"""Spacings: which timesteps or noise levels of a model's training a schedule of few steps takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, cast

import numpy as np

from runtime.diffusion.published import SchedulerFields, Spacing
from runtime.diffusion.schedule import Floats
from runtime.diffusion.training import Table
from runtime.errors import InvalidInput

KARRAS_RHO: Final = 7.0
BETA: Final = 0.6
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


def exponential(first: float, last: float, steps: int) -> Floats:
    """Noise levels evenly spaced in their logarithm, float64 [steps] (Crowson's k-diffusion,
    get_sigmas_exponential).
    """
    return cast(Floats, np.exp(np.linspace(math.log(first), math.log(last), steps)))


def lu(first: float, last: float, steps: int) -> Floats:
    """Likewise, in the float32 logarithms of training, float64 [steps] (Lu et al. 2022, section 4.1; arXiv
    2206.00927).
    """
    ends = [float(np.log(np.float32(level))) for level in (first, last)]
    return cast(Floats, np.exp(np.linspace(ends[0], ends[1], steps)))


def beta(first: float, last: float, steps: int) -> Floats:
    """Noise levels at evenly spaced quantiles of the Beta(0.6, 0.6) distribution between both ends, so that they are
    denser there, float64 [steps] (Lee et al. 2024, arXiv 2407.12173).
    """
    first, last = float(first), float(last)
    return last + _beta_quantiles(1 - np.linspace(0, 1, steps)) * (first - last)


def _beta_quantiles(shares: Floats) -> Floats:
    """Where the distribution function of Beta(0.6, 0.6) has these values, float64: bisection on its power series, which
    converges fast below one half; above, by symmetry.
    """
    powers = np.arange(1, 60)
    series = np.cumprod([1, *((powers - BETA) / powers)]) / (BETA + np.arange(60))

    def mass(x: Floats) -> Floats:
        return cast(Floats, x**BETA * np.polynomial.polynomial.polyval(x, series))

    wanted = np.minimum(shares, 1 - shares) * 2 * mass(np.array(0.5))
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = mass(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.5, low, 1 - low)


SPACINGS: Final[Mapping[str, Callable[[float, float, int], Floats]]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "lu": lu,
}
"""Spacings of noise levels by name."""
USUAL: Final = ("karras", "exponential", "beta")


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
