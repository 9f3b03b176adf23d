"""The numbers that a plan makes of a layer: of its weight, and of its input."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from calibration.quantize.float8 import FP8_PEAK, Float8Weight, fp8_columns
from calibration.quantize.layers import Layer, tensor_of
from calibration.quantize.nf4 import Nf4Weight, nf4_blocks
from calibration.quantize.plan import LayerPlan
from calibration.quantize.weights import (
    INT8_PEAK,
    Floats,
    Known,
    NestedWeight,
    QuantizedWeight,
    int4_blocks,
    int8_columns,
    nested_blocks,
)
from runtime.targets.lowering.nf4 import VALUES

TINY: Final = float(np.finfo(np.float32).tiny)


def quantized_weight(
    layer: Layer, planned: LayerPlan, importance: Floats | None = None, known: Known | None = None
) -> QuantizedWeight:
    """The layer's weight in the planned form, which is not float. `importance` is for 4 bits, `known` for int4."""
    source = tensor_of(layer.weight)
    if planned.weight_type == "fp8":
        return Float8Weight(source, layer.by_output)
    if planned.weight_type == "nf4":
        return Nf4Weight(source, layer.by_output, planned.block, importance)
    if planned.nested:
        return NestedWeight(source, layer.by_output, planned.block, planned.op == "Conv", importance, known)
    return QuantizedWeight(source, layer.by_output, planned.block, importance, known)


def restored(weights: Floats, planned: LayerPlan, importance: Floats | None) -> Floats:
    """What quantization leaves of some columns [K, C] of a weight."""
    if planned.weight_type == "float":
        return weights
    if planned.nested:
        codes, factors, base = nested_blocks(weights, planned.block, importance)
        return _product(codes, np.repeat(factors.astype(np.float32) * base, planned.block, axis=0))
    if planned.block:
        nf4 = planned.weight_type == "nf4"
        codes, halves = (nf4_blocks if nf4 else int4_blocks)(weights, planned.block, importance)
        scales = np.repeat(halves.astype(np.float32), planned.block, axis=0)
        return _product(VALUES[codes] if nf4 else codes, scales)
    numbers, scales = (fp8_columns if planned.weight_type == "fp8" else int8_columns)(weights)
    return _product(numbers.astype(np.float32), scales)


def _product(codes: NDArray[np.int8] | Floats, scales: Floats) -> Floats:
    return np.multiply(codes, scales, dtype=np.float32)


def input_step(peak: float, fp8: bool = False) -> np.float32:
    """The scale of a quantized input whose largest magnitude is `peak`; positive for one that is always zero, too."""
    return np.float32(max(peak / (FP8_PEAK if fp8 else INT8_PEAK), TINY))
