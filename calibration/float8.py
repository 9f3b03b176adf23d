"""E4M3 numbers of a weight: one scale a channel, so that its largest magnitude is the largest there is, 448 (OCP 8-bit floats, 2023).

A number keeps three binary digits whatever its magnitude, |error| <= |weight| / 16, until it is below scale / 64, where steps are even.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.weights import WORKERS, Floats, check, chunks, release

FP8: Final = ml_dtypes.float8_e4m3fn
FP8_PEAK: Final = 448.0


def fp8_columns(weights: Floats) -> tuple[NDArray[Any], Floats]:
    """E4M3 codes [K, N] and scales [N] of weights [K, N]: a weight is about code * scale. A column of zeros has scale 1."""
    scales = np.abs(weights).max(axis=0) / np.float32(FP8_PEAK)
    scales[scales < np.finfo(np.float32).tiny] = 1
    return np.clip(weights / scales, -FP8_PEAK, FP8_PEAK).astype(FP8), scales


class Float8Weight:
    """A weight seen as a matrix [K, N] and its E4M3 tensors, each computed when asked for, a few columns at a time.

    `source` is stored as [N, K, ...] when `transposed`, else as [K, N]. Asking for the codes leaves the scales behind for the next who
    asks, so that writing a graph converts each weight once. Raises SourceError for weights that are not finite.
    """

    def __init__(self, source: ir.TensorProtocol, transposed: bool) -> None:
        self.source, self.transposed = source, transposed
        shape = tuple(source.shape.numpy())
        self.rows, self.columns = (math.prod(shape[1:]), shape[0]) if transposed else shape
        self._scales: Floats | None = None

    def codes(self) -> ir.TensorProtocol:
        """[K, N]."""
        return ir.tensor(self._convert())

    def kernel(self) -> ir.TensorProtocol:
        """In the stored order, as convolutions take it."""
        return ir.tensor(np.ascontiguousarray(self._convert().T).reshape(tuple(self.source.shape.numpy())))

    def scales(self) -> ir.TensorProtocol:
        """float32 [N]."""
        if self._scales is None:
            self._convert()
        scales, self._scales = self._scales, None
        assert scales is not None
        return ir.tensor(scales)

    def _convert(self) -> NDArray[Any]:
        codes, scales = np.empty((self.rows, self.columns), FP8), np.empty(self.columns, np.float32)
        with ThreadPoolExecutor(WORKERS) as pool:
            for _ in pool.map(partial(self._fill, self.source.numpy(), codes, scales), chunks(self.rows, self.columns)):
                pass  # raises what a worker raised
        release(self.source)
        self._scales = scales
        return codes

    def _fill(self, values: NDArray[Any], codes: NDArray[Any], scales: Floats, chunk: slice) -> None:
        """Convert the columns of one chunk into place."""
        if self.transposed:
            part = np.ascontiguousarray(values[chunk].reshape(-1, self.rows).astype(np.float32).T)
        else:
            part = values[:, chunk].astype(np.float32)
        check(self.source.name, part, float(np.finfo(np.float32).max))
        codes[:, chunk], scales[chunk] = fp8_columns(part)
