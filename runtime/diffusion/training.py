"""The noise that a model was trained with at every timestep, computed from the fields of a published scheduler file in
the float32 steps that models were trained with.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.published import SchedulerFields

Table = NDArray[np.float32]

ZERO_SNR_FLOOR: Final = 2.0**-24
"""Stands in for ᾱ = 0 where an algorithm divides by it: the smallest half-precision number, as in diffusers."""


def alphas_cumprod(fields: SchedulerFields) -> Table:
    """The signal share ᾱ (alpha bar, 1 = clean, 0 = pure noise) of every training timestep, float32
    [num_train_timesteps].
    """
    betas = _betas(fields)
    return _cumulative(_zero_terminal_snr(betas) if fields.rescale_betas_zero_snr else betas)


def noise_levels(fields: SchedulerFields) -> Table:
    """Noise over signal at every training timestep, float32 [num_train_timesteps], finite."""
    bar = alphas_cumprod(fields)
    if fields.rescale_betas_zero_snr:
        bar[-1] = ZERO_SNR_FLOOR
    return cast(Table, np.sqrt((1 - bar) / bar))


def _betas(fields: SchedulerFields) -> Table:
    """The variance that each training step adds."""
    count = fields.num_train_timesteps
    if fields.trained_betas is not None:
        return np.array(fields.trained_betas, np.float32)
    match fields.beta_schedule:
        case "linear":
            return _linspace(fields.beta_start, fields.beta_end, count)
        case "scaled_linear":
            return _linspace(fields.beta_start**0.5, fields.beta_end**0.5, count) ** 2
        case "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation (17) (arXiv 2102.09672)
            bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            return np.array([min(1 - b / a, 0.999) for a, b in pairwise(bar)], np.float32)


def _linspace(first: float, last: float, count: int) -> Table:
    """Evenly spaced float32 numbers, to the last bit those of torch.linspace: a float32 step, taken from the nearer
    end.
    """
    start, end = np.float32(first), np.float32(last)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index)).astype(np.float32)


def _cumulative(betas: Table) -> Table:
    """The products of 1 - β so far: summed up in double precision, as torch does, then rounded."""
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: Table) -> Table:
    """Betas shifted and scaled so that the last timestep is pure noise (Lin et al. 2023, algorithm 1; arXiv
    2305.08891).
    """
    root = np.sqrt(_cumulative(betas))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return cast(Table, 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
