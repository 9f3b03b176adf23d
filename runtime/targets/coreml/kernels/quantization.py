"""Dequantization of stored weights; quantization and dequantization of activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.bundle.signature import Array
from runtime.targets.coreml.constants import dequantize
from runtime.targets.coreml.kernels.base import TYPES, kernel


@kernel("constexpr_blockwise_shift_scale")
def _blockwise(data: Array, scale: Array, offset: Array | None = None) -> Any:
    return dequantize(data, scale, offset)


@kernel("constexpr_cast")
def _constexpr_cast(source_val: Array, output_dtype: str) -> Any:
    return source_val.astype(TYPES[output_dtype])


def _along(parameter: Any, input: Any, axis: Any) -> Any:
    """One number for all elements, or one for each index along the axis."""
    return (
        parameter
        if np.ndim(parameter) == 0
        else parameter.reshape([-1 if at == int(axis) % input.ndim else 1 for at in range(input.ndim)])
    )


@kernel("quantize")
def _quantize(input: Any, scale: Any, output_dtype: str, zero_point: Any = None, axis: Any = None) -> Any:
    limits = np.iinfo(output_dtype)
    codes = np.round(input / _along(scale, input, axis))
    if zero_point is not None:
        codes += _along(zero_point, input, axis)
    return codes.clip(limits.min, limits.max).astype(output_dtype)


@kernel("dequantize")
def _dequantize(input: Any, scale: Any, zero_point: Any = None, axis: Any = None) -> Any:
    codes = input.astype(np.float32)
    if zero_point is not None:
        codes -= _along(zero_point.astype(np.float32), input, axis)
    return codes * _along(scale, input, axis)
