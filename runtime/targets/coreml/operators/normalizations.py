"""Normalizations over the last axes, and over groups of channels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from runtime.targets.coreml.operators.base import attribute, given, like, operator, refuse

if TYPE_CHECKING:
    import onnx_ir as ir

LEAST: Final = 2.0**-10
"""The least divisor of a group in half precision: smaller values vanish beside epsilon."""


@operator("LayerNormalization")
def _layer_norm(t: Any, node: ir.Node) -> Any:
    x, bias = t.var(node.inputs[0]), given(node, 2)
    axis = attribute(node, "axis", -1) % x.rank
    found = {"gamma": t.var(node.inputs[1])} | ({} if bias is None else {"beta": t.var(bias)})
    epsilon = like(t, x, attribute(node, "epsilon", 1e-5))
    return t.mb.layer_norm(x=x, axes=list(range(axis - x.rank, 0)), epsilon=epsilon, **found)


@operator("GroupNormalization")
def _group_norm(t: Any, node: ir.Node) -> Any:
    """Means over the positions of each channel, then over the channels of each group: no shape depends on how many
    positions there are.
    """
    x, groups = t.var(node.inputs[0]), attribute(node, "num_groups", 1)
    centred = t.mb.sub(x=x, y=_group_means(t, x, groups))
    epsilon = attribute(node, "epsilon", 1e-5)
    if x.dtype == t.mb.types.fp16:
        normal = _normal_in_half(t, centred, groups, epsilon)
    else:
        root = t.mb.rsqrt(x=_group_means(t, t.mb.square(x=centred), groups), epsilon=like(t, x, epsilon))
        normal = t.mb.mul(x=centred, y=root)
    scale, bias = (t.numbers(value) for value in node.inputs[1:3])
    if scale is None or bias is None:
        raise refuse(node, "scales by what is computed")
    along = (-1, *[1] * (x.rank - 2))
    return t.mb.add(x=t.mb.mul(x=normal, y=scale.reshape(along)), y=bias.reshape(along))


def _normal_in_half(t: Any, centred: Any, groups: int, epsilon: float) -> Any:
    """Divide by the group's greatest value first, since squares from 256 on exceed the range of 16 bits.

    With z = centred / greatest, centred / sqrt(mean(centred ** 2) + epsilon) is z / sqrt(mean(z ** 2) + epsilon /
    greatest ** 2).
    """
    greatest = t.mb.maximum(x=_of_groups(t, t.mb.abs(x=centred), groups, t.mb.reduce_max), y=like(t, centred, LEAST))
    shares = t.mb.real_div(x=centred, y=greatest)
    share = t.mb.square(x=t.mb.real_div(x=like(t, centred, math.sqrt(epsilon)), y=greatest))
    variance = t.mb.add(x=_group_means(t, t.mb.square(x=shares), groups), y=share)
    return t.mb.mul(x=shares, y=t.mb.rsqrt(x=variance, epsilon=like(t, centred, 1e-7)))


def _group_means(t: Any, x: Any, groups: int) -> Any:
    return _of_groups(t, x, groups, t.mb.reduce_mean)


def _of_groups(t: Any, x: Any, groups: int, reduce: Any) -> Any:
    """[batch, channels, 1, ...]: the reduction of each channel's group."""
    channels = int(x.shape[1])
    found = reduce(x=x, axes=list(range(2, x.rank)), keep_dims=True)
    found = reduce(x=t.mb.reshape(x=found, shape=[-1, groups, channels // groups]), axes=[2], keep_dims=True)
    return t.mb.reshape(
        x=t.mb.tile(x=found, reps=[1, 1, channels // groups]), shape=[-1, channels] + [1] * (x.rank - 2)
    )
