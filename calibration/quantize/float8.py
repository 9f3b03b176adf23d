"""E4M3 numbers of a weight: one scale a channel, so that its largest magnitude is the largest there is, 448 (OCP 8-bit
floats, 2023).

A number keeps three binary digits whatever its magnitude, |error| <= |weight| / 16, until it is below scale / 64, where
steps are even.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from calibration.quantize.weights import Floats, QuantizedWeight

FP8: Final = ml_dtypes.float8_e4m3fn
FP8_PEAK: Final = 448.0


def fp8_columns(weights: Floats) -> tuple[NDArray[Any], Floats]:
    """E4M3 codes [K, N] and scales [N] of weights [K, N]: a weight is about code * scale. A column of zeros has scale
    1.
    """
    scales = np.abs(weights).max(axis=0) / np.float32(FP8_PEAK)
    scales[scales < np.finfo(np.float32).tiny] = 1
    return np.clip(weights / scales, -FP8_PEAK, FP8_PEAK).astype(FP8), scales


class Float8Weight(QuantizedWeight):
    """A weight whose tensors are E4M3: the same in all else."""

    dtype = FP8

    def _columns(self, part: Floats) -> tuple[NDArray[Any], Floats]:
        return fp8_columns(part)
