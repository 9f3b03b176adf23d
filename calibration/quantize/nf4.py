"""nf4 numbers of a weight: each block has a float16 scale, its largest magnitude or a little less, and codes of 4 bits
that stand for the 16 values of `runtime.targets.lowering.nf4` (Dettmers et al. 2023, arXiv 2305.14314).

The values lie closer near zero, as normally distributed weights do.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.quantize.weights import Codes, Floats, Grid, QuantizedWeight, blocks_of, half
from runtime.targets.lowering.nf4 import VALUES

NEAREST: Final = np.searchsorted(
    (VALUES[1:] + VALUES[:-1]) / 2, np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
).astype(np.int8)
"""The code of the value that is nearest to each float16, by its bits."""


def _codes(values: Floats) -> Codes:
    with np.errstate(over="ignore"):  # beyond float16 is beyond the last value
        codes: Codes = NEAREST[values.astype(np.float16).view(np.uint16)]
    return codes


def _snap(values: Floats) -> None:
    np.take(VALUES, _codes(values), out=values, mode="clip")


NF4: Final = Grid(1.0, _snap, _codes)


def nf4_blocks(weights: Floats, block: int, importance: Floats | None = None) -> tuple[Codes, NDArray[np.float16]]:
    """Codes [K, N] in 0..15 and scales [K / block, N] of weights [K, N], chosen as those of
    `calibration.quantize.weights.int4_blocks`: a weight is about VALUES[code] * scale.
    """
    codes, scales = blocks_of(weights, block, importance, half, NF4)
    return codes, scales.astype(np.float16)


class Nf4Weight(QuantizedWeight):
    """A weight whose codes are those of nf4: the same in all else."""

    packed = ir.DataType.UINT4
    largest = float(np.finfo(np.float16).max)

    def _blocks(self, part: Floats, chunk: slice) -> tuple[Codes, NDArray[np.float16]]:
        return nf4_blocks(part, self.block, self.importance)
