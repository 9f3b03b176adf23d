"""Operators that move elements or compute with shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.targets.coreml.operators.base import attribute, given, kept, like, operator, placed, refuse, reshaped
from runtime.targets.lowering.values import operand, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

LAST: Final = 2**31 - 1


@operator("Shape")
def _shape(t: Any, node: ir.Node) -> Any:
    x = t.var(node.inputs[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", x.rank)
    whole = t.mb.shape(x=x)
    return (
        whole
        if (start, end) == (0, x.rank)
        else t.mb.slice_by_index(x=whole, begin=[start % x.rank], end=[end if end > 0 else end + x.rank])
    )


@operator("Reshape")
def _reshape(t: Any, node: ir.Node) -> Any:
    x, lengths = t.var(node.inputs[0]), t.numbers(node.inputs[1])
    if lengths is None:
        return t.mb.reshape(x=x, shape=t.var(node.inputs[1]))
    if x.rank == 0:
        return t.mb.expand_dims(x=x, axes=list(range(len(lengths))))
    shape = [int(length) for length in lengths]
    if not attribute(node, "allowzero", 0):
        shape = [kept(t, x, axis) if length == 0 else length for axis, length in enumerate(shape)]
    return reshaped(t, x, shape)


@operator("Transpose")
def _transpose(t: Any, node: ir.Node) -> Any:
    constant = t.constant(node.inputs[0])
    if constant is not None:
        return constant.transposed(tuple(attribute(node, "perm", range(len(constant.shape) - 1, -1, -1))))
    x = t.var(node.inputs[0])
    return t.mb.transpose(x=x, perm=list(attribute(node, "perm", range(x.rank - 1, -1, -1))))


@operator("Unsqueeze")
def _unsqueeze(t: Any, node: ir.Node) -> Any:
    return t.mb.expand_dims(x=t.var(node.inputs[0]), axes=[int(axis) for axis in t.numbers(node.inputs[1])])


@operator("Squeeze")
def _squeeze(t: Any, node: ir.Node) -> Any:
    axes = t.numbers(given(node, 1))
    x = t.var(node.inputs[0])
    return t.mb.squeeze(
        x=x,
        axes=[axis for axis, length in enumerate(x.shape) if length == 1]
        if axes is None
        else [int(axis) for axis in axes],
    )


@operator("Concat")
def _concat(t: Any, node: ir.Node) -> Any:
    return t.mb.concat(values=[t.var(value) for value in node.inputs], axis=attribute(node, "axis", 0))


@operator("Split")
def _split(t: Any, node: ir.Node) -> Any:
    x, sizes = t.var(node.inputs[0]), t.numbers(given(node, 1))
    axis = attribute(node, "axis", 0)
    if sizes is None:
        return t.mb.split(x=x, num_splits=attribute(node, "num_outputs", len(node.outputs)), axis=axis)
    return t.mb.split(x=x, split_sizes=[int(size) for size in sizes], axis=axis)


@operator("Expand")
def _expand(t: Any, node: ir.Node) -> Any:
    """Added to zeros of the wanted shape, since MIL has no such operator."""
    x, shape = t.var(node.inputs[0]), t.var(node.inputs[1])
    if x.dtype == t.mb.types.bool:
        return t.mb.logical_or(x=x, y=t.mb.fill(shape=shape, value=False))
    return t.mb.add(x=x, y=t.mb.fill(shape=shape, value=like(t, x, 0)))


@operator("Tile")
def _tile(t: Any, node: ir.Node) -> Any:
    return t.mb.tile(x=t.var(node.inputs[0]), reps=t.var(node.inputs[1]))


@operator("Range")
def _range(t: Any, node: ir.Node) -> Any:
    start, end, step = map(t.var, node.inputs)
    return t.mb.range_1d(start=start, end=end, step=step)


@operator("Slice")
def _slice(t: Any, node: ir.Node) -> Any:
    x = t.var(node.inputs[0])
    axes, steps = t.numbers(given(node, 3)), t.numbers(given(node, 4))
    starts, ends = t.numbers(node.inputs[1]), t.numbers(node.inputs[2])
    if axes is None:
        axes = np.arange(shape_of(operand(node, 1))[0])
    if steps is not None and (steps < 1).any():
        raise refuse(node, "goes backwards")
    begin, end, stride = [0] * x.rank, [0] * x.rank, [1] * x.rank
    from_start, to_end = [True] * x.rank, [True] * x.rank
    for index, axis in enumerate(int(axis) % x.rank for axis in axes):
        stride[axis] = 1 if steps is None else int(steps[index])
        from_start[axis] = starts is not None and int(starts[index]) == 0
        to_end[axis] = ends is not None and int(ends[index]) >= _longest(x.shape[axis])
        begin[axis] = 0 if starts is None or from_start[axis] else _clamped(int(starts[index]), x.shape[axis])
        end[axis] = 0 if ends is None or to_end[axis] else int(ends[index])
    begins = begin if starts is not None else placed(t, node, begin, axes, t.var(node.inputs[1]))
    finishes = end if ends is not None else placed(t, node, end, axes, t.var(node.inputs[2]))
    return t.mb.slice_by_index(x=x, begin=begins, end=finishes, stride=stride, begin_mask=from_start, end_mask=to_end)


def _longest(length: Any) -> int:
    return length if isinstance(length, int) else LAST


def _clamped(start: int, length: Any) -> int:
    return max(start, -length) if isinstance(length, int) else start


@operator("Gather")
def _gather(t: Any, node: ir.Node) -> Any:
    return t.mb.gather(
        x=t.weight(node.inputs[0]),
        indices=t.var(node.inputs[1]),
        axis=attribute(node, "axis", 0),
        validate_indices=False,
    )


@operator("GatherND")
def _gather_nd(t: Any, node: ir.Node) -> Any:
    x, indices = map(t.var, node.inputs)
    return t.mb.gather_nd(x=x, indices=indices, batch_dims=attribute(node, "batch_dims", 0), validate_indices=False)


@operator("Resize")
def _resize(t: Any, node: ir.Node) -> Any:
    nearest = attribute(node, "mode", "nearest") == "nearest" and attribute(node, "nearest_mode", "") == "floor"
    if not nearest or attribute(node, "coordinate_transformation_mode", "") != "asymmetric":
        raise refuse(node, "is not nearest, asymmetric and floor")
    x, sizes = t.var(node.inputs[0]), given(node, 3)
    return _repeated(t, node, x, t.numbers(given(node, 2))) if sizes is None else _resized(t, x, t.var(sizes))


def _repeated(t: Any, node: ir.Node, x: Any, scales: Any) -> Any:
    if scales is None or len(scales) != 4 or any(scales[:2] != 1) or any(scales != np.floor(scales)):
        raise refuse(node, "does not repeat height and width a whole number of times")
    height, width = map(float, scales[2:])
    return t.mb.upsample_nearest_neighbor(x=x, scale_factor_height=height, scale_factor_width=width)


def _resized(t: Any, x: Any, sizes: Any) -> Any:
    """Height and width as in `sizes`: position i of an edge is a copy of position floor(i * old length / new length).

    It is a repetition where that is known when compiling, which the Neural Engine computes.
    """
    before, after = x.shape[2:], sizes.val[2:] if sizes.val is not None else ()
    if len(after) and all(isinstance(old, int) and new % old == 0 for old, new in zip(before, after, strict=True)):
        height, width = (float(new // old) for old, new in zip(before, after, strict=True))
        return t.mb.upsample_nearest_neighbor(x=x, scale_factor_height=height, scale_factor_width=width)
    lengths = t.mb.shape(x=x)
    for axis in (2, 3):
        old, new = (t.mb.gather(x=vector, indices=axis, axis=0) for vector in (lengths, sizes))
        places = t.mb.floor_div(x=t.mb.mul(x=t.mb.range_1d(start=0, end=new, step=1), y=old), y=new)
        x = t.mb.gather(x=x, indices=places, axis=axis, validate_indices=False)
    return x
