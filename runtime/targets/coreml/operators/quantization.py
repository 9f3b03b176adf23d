"""QuantizeLinear and DequantizeLinear, of weights and of activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.targets.coreml.constants import Constant
from runtime.targets.coreml.operators.base import attribute, given, operator, refuse

if TYPE_CHECKING:
    import onnx_ir as ir


@operator("QuantizeLinear")
def _quantize(t: Any, node: ir.Node) -> Any:
    scale, offset = t.numbers(node.inputs[1]), t.numbers(given(node, 2))
    if scale is None or (given(node, 2) is not None and offset is None):
        raise refuse(node, "has a computed scale")
    dtype = (
        "int8"
        if offset is None and attribute(node, "output_dtype", 2) == 3
        else "uint8"
        if offset is None
        else offset.dtype.name
    )
    return t.mb.quantize(input=t.var(node.inputs[0]), output_dtype=dtype, **_affine(node, scale, offset))


@operator("DequantizeLinear")
def _dequantize(t: Any, node: ir.Node) -> Any:
    constant = t.constant(node.inputs[0])
    scale, offset = t.numbers(node.inputs[1]), t.numbers(given(node, 2))
    if scale is None:
        raise refuse(node, "has a computed scale")
    if constant is None:
        return t.mb.dequantize(input=t.var(node.inputs[0]), **_affine(node, scale, offset))
    blocks = _blocks(constant.shape, attribute(node, "axis", 1), scale.shape)
    shift = None if offset is None or not offset.any() else offset.reshape(blocks)
    return Constant(constant.shape, constant.stored, scale.dtype.name, constant.read, scale.reshape(blocks), shift)


def _affine(node: ir.Node, scale: Any, offset: Any) -> dict[str, Any]:
    """Scale, offset where it is not zero, and axis, in MIL's form: single numbers, or vectors along an axis."""
    if scale.ndim > 1:
        raise refuse(node, "quantizes what is computed by blocks")
    one = scale.size == 1
    found = {"scale": scale.reshape(()) if one else scale}
    if offset is not None and offset.any():
        found["zero_point"] = offset.reshape(()) if one else offset
    return found if one else found | {"axis": np.int32(attribute(node, "axis", 1))}


def _blocks(shape: tuple[int, ...], axis: int, scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales with the rank of their codes: one for all, one for each index along an axis, or one for each
    block.
    """
    if len(scales) == len(shape) and len(shape) > 1:
        return scales
    if math.prod(scales) == 1:
        return (1,) * len(shape)
    return tuple(length if index == axis % len(shape) else 1 for index, length in enumerate(shape))
