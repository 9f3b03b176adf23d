"""How each operator of the canonical graph is said in MIL. One function for each; what it returns are the node's outputs, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from runtime.errors import EngineError
from runtime.mil.constants import Constant

Operator = Callable[[Any, Any], Any]
"""Takes the translator and the node of onnx_ir."""
OPERATORS: Final[dict[str, Operator]] = {}
LAST: Final = 2**31 - 1
LEAST: Final = 2.0**-10
"""What a group is divided by at least, in half: beside epsilon, smaller values are nothing."""
UNARY: Final[Mapping[str, str]] = {
    **{"Abs": "abs", "Ceil": "ceil", "Cos": "cos", "Erf": "erf", "Exp": "exp", "Floor": "floor", "Not": "logical_not", "Relu": "relu"},
    **{"Sigmoid": "sigmoid", "Sin": "sin", "Sqrt": "sqrt", "Tanh": "tanh"},
}
BINARY: Final[Mapping[str, str]] = {
    **{"Add": "add", "And": "logical_and", "Equal": "equal", "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less"},
    **{"LessOrEqual": "less_equal", "Max": "maximum", "Min": "minimum", "Mul": "mul", "Or": "logical_or", "Pow": "pow", "Sub": "sub"},
}
REDUCTIONS: Final[Mapping[str, str]] = {
    "ReduceMax": "reduce_max",
    "ReduceMean": "reduce_mean",
    "ReduceMin": "reduce_min",
    "ReduceSum": "reduce_sum",
}
TYPES: Final[Mapping[str, str]] = {"FLOAT": "fp32", "FLOAT16": "fp16", "INT64": "int32", "INT32": "int32", "BOOL": "bool"}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register the translation of these operators."""

    def add(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of an attribute of the node."""
    return node.attributes[name].value if name in node.attributes else default


def refuse(node: Any, what: str) -> EngineError:
    """The error for a form of an operator that is not translated."""
    return EngineError(f"node '{node.name}' ({node.op_type}) {what}, which is not translated to Core ML")


def given(node: Any, index: int) -> Any:
    """An input that may be left out: None where it is."""
    return node.inputs[index] if index < len(node.inputs) else None


@operator(*UNARY)
def _unary(t: Any, node: Any) -> Any:
    return getattr(t.mb, UNARY[node.op_type])(x=t.var(node.inputs[0]))


@operator(*BINARY)
def _binary(t: Any, node: Any) -> Any:
    if len(node.inputs) != 2:
        raise refuse(node, f"has {len(node.inputs)} inputs")
    x, y = map(t.var, node.inputs)
    return getattr(t.mb, BINARY[node.op_type])(x=x, y=y)


@operator("Div")
def _div(t: Any, node: Any) -> Any:
    """Of integers, whole: they are lengths, so that truncation and floor are the same."""
    x, y = map(t.var, node.inputs)
    whole = t.mb.types.is_int(x.dtype)
    return t.mb.floor_div(x=x, y=y) if whole else t.mb.real_div(x=x, y=y)


@operator("Neg")
def _neg(t: Any, node: Any) -> Any:
    x = t.var(node.inputs[0])
    return t.mb.mul(x=x, y=_like(t, x, -1))


@operator("Reciprocal")
def _reciprocal(t: Any, node: Any) -> Any:
    x = t.var(node.inputs[0])
    return t.mb.real_div(x=_like(t, x, 1), y=x)


def _like(t: Any, x: Any, number: float) -> Any:
    return t.mb.types.nptype_from_builtin(x.dtype)(number)


@operator("Gelu")
def _gelu(t: Any, node: Any) -> Any:
    mode = "EXACT" if attribute(node, "approximate", "none") == "none" else "TANH_APPROXIMATION"
    return t.mb.gelu(x=t.var(node.inputs[0]), mode=mode)


@operator("Softmax")
def _softmax(t: Any, node: Any) -> Any:
    return t.mb.softmax(x=t.var(node.inputs[0]), axis=attribute(node, "axis", -1))


@operator("Where")
def _where(t: Any, node: Any) -> Any:
    condition, x, y = map(t.var, node.inputs)
    return t.mb.select(cond=condition, a=x, b=y)


@operator("Identity")
def _identity(t: Any, node: Any) -> Any:
    return t.constant(node.inputs[0]) or t.var(node.inputs[0])


@operator("Constant")
def _constant(t: Any, node: Any) -> Any:
    tensor = attribute(node, "value", None)
    if tensor is None:
        raise refuse(node, "holds no tensor")
    return Constant(tuple(tensor.shape), tensor.numpy().dtype.name, tensor.numpy().dtype.name, tensor.numpy)


@operator("Cast")
def _cast(t: Any, node: Any) -> Any:
    name = t.ir.DataType(attribute(node, "to", 1)).name
    if name not in TYPES:
        raise refuse(node, f"casts to {name.lower()}")
    constant = t.constant(node.inputs[0])
    if constant is not None:
        return constant.cast({"FLOAT": "float32"}.get(name, name.lower()))
    x = t.var(node.inputs[0])
    return x if t.mb.types.builtin_to_string(x.dtype) == TYPES[name] else t.mb.cast(x=x, dtype=TYPES[name])


@operator(*REDUCTIONS)
def _reduce(t: Any, node: Any) -> Any:
    axes = t.numbers(given(node, 1))
    x = t.var(node.inputs[0])
    axes = list(range(x.rank)) if axes is None else [int(axis) for axis in axes]
    return getattr(t.mb, REDUCTIONS[node.op_type])(x=x, axes=axes, keep_dims=bool(attribute(node, "keepdims", 1)))


@operator("ArgMax")
def _argmax(t: Any, node: Any) -> Any:
    if attribute(node, "select_last_index", 0):
        raise refuse(node, "takes the last of equals")
    x = t.var(node.inputs[0])
    return t.mb.reduce_argmax(x=x, axis=attribute(node, "axis", 0), keep_dims=bool(attribute(node, "keepdims", 1)))


# Shapes


@operator("Shape")
def _shape(t: Any, node: Any) -> Any:
    x = t.var(node.inputs[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", x.rank)
    whole = t.mb.shape(x=x)
    return (
        whole
        if (start, end) == (0, x.rank)
        else t.mb.slice_by_index(x=whole, begin=[start % x.rank], end=[end if end > 0 else end + x.rank])
    )


@operator("Reshape")
def _reshape(t: Any, node: Any) -> Any:
    x, lengths = t.var(node.inputs[0]), t.numbers(node.inputs[1])
    if lengths is None:
        return t.mb.reshape(x=x, shape=t.var(node.inputs[1]))
    if x.rank == 0:
        return t.mb.expand_dims(x=x, axes=list(range(len(lengths))))
    shape = [int(length) for length in lengths]
    if not attribute(node, "allowzero", 0):
        shape = [_kept(t, x, axis) if length == 0 else length for axis, length in enumerate(shape)]
    return _reshaped(t, x, shape)


def _reshaped(t: Any, x: Any, shape: list[Any]) -> Any:
    """Reshape to lengths, each a number or a vector of one."""
    if all(isinstance(length, int) for length in shape):
        return t.mb.reshape(x=x, shape=shape)
    parts = [np.array([length], np.int32) if isinstance(length, int) else length for length in shape]
    return t.mb.reshape(x=x, shape=t.mb.concat(values=parts, axis=0))


def _kept(t: Any, x: Any, axis: int) -> Any:
    """The length of an axis: a number where it is fixed, else a vector of one."""
    length = x.shape[axis]
    return int(length) if isinstance(length, int | np.integer) else t.mb.slice_by_index(x=t.mb.shape(x=x), begin=[axis], end=[axis + 1])


@operator("Transpose")
def _transpose(t: Any, node: Any) -> Any:
    constant = t.constant(node.inputs[0])
    if constant is not None:
        return constant.transposed(tuple(attribute(node, "perm", range(len(constant.shape) - 1, -1, -1))))
    x = t.var(node.inputs[0])
    return t.mb.transpose(x=x, perm=list(attribute(node, "perm", range(x.rank - 1, -1, -1))))


@operator("Unsqueeze")
def _unsqueeze(t: Any, node: Any) -> Any:
    return t.mb.expand_dims(x=t.var(node.inputs[0]), axes=[int(axis) for axis in t.numbers(node.inputs[1])])


@operator("Squeeze")
def _squeeze(t: Any, node: Any) -> Any:
    axes = t.numbers(given(node, 1))
    x = t.var(node.inputs[0])
    return t.mb.squeeze(
        x=x, axes=[axis for axis, length in enumerate(x.shape) if length == 1] if axes is None else [int(axis) for axis in axes]
    )


@operator("Concat")
def _concat(t: Any, node: Any) -> Any:
    return t.mb.concat(values=[t.var(value) for value in node.inputs], axis=attribute(node, "axis", 0))


@operator("Split")
def _split(t: Any, node: Any) -> Any:
    x, sizes = t.var(node.inputs[0]), t.numbers(given(node, 1))
    axis = attribute(node, "axis", 0)
    if sizes is None:
        return t.mb.split(x=x, num_splits=attribute(node, "num_outputs", len(node.outputs)), axis=axis)
    return t.mb.split(x=x, split_sizes=[int(size) for size in sizes], axis=axis)


@operator("Expand")
def _expand(t: Any, node: Any) -> Any:
    """Added to nothing of the wanted shape: MIL has no operator of its own for it."""
    x, shape = t.var(node.inputs[0]), t.var(node.inputs[1])
    if x.dtype == t.mb.types.bool:
        return t.mb.logical_or(x=x, y=t.mb.fill(shape=shape, value=False))
    return t.mb.add(x=x, y=t.mb.fill(shape=shape, value=_like(t, x, 0)))


@operator("Range")
def _range(t: Any, node: Any) -> Any:
    start, end, step = map(t.var, node.inputs)
    return t.mb.range_1d(start=start, end=end, step=step)


@operator("Slice")
def _slice(t: Any, node: Any) -> Any:
    x = t.var(node.inputs[0])
    axes, steps = t.numbers(given(node, 3)), t.numbers(given(node, 4))
    starts, ends = t.numbers(node.inputs[1]), t.numbers(node.inputs[2])
    if axes is None:
        axes = np.arange(node.inputs[1].shape[0])
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
    begins = begin if starts is not None else _placed(t, node, begin, axes, t.var(node.inputs[1]))
    finishes = end if ends is not None else _placed(t, node, end, axes, t.var(node.inputs[2]))
    return t.mb.slice_by_index(x=x, begin=begins, end=finishes, stride=stride, begin_mask=from_start, end_mask=to_end)


def _longest(length: Any) -> int:
    return length if isinstance(length, int) else LAST


def _clamped(start: int, length: Any) -> int:
    return max(start, -length) if isinstance(length, int) else start


def _placed(t: Any, node: Any, rest: list[int], axes: Any, computed: Any) -> Any:
    """A vector with a number for every axis, one of them computed."""
    if len(axes) != 1:
        raise refuse(node, "has computed bounds for several axes")
    axis = int(axes[0]) % len(rest)
    parts = [np.array(rest[:axis], np.int32), computed, np.array(rest[axis + 1 :], np.int32)]
    return t.mb.concat(values=[part for part in parts if not isinstance(part, np.ndarray) or part.size], axis=0)


@operator("Gather")
def _gather(t: Any, node: Any) -> Any:
    return t.mb.gather(x=t.weight(node.inputs[0]), indices=t.var(node.inputs[1]), axis=attribute(node, "axis", 0), validate_indices=False)


@operator("GatherND")
def _gather_nd(t: Any, node: Any) -> Any:
    x, indices = map(t.var, node.inputs)
    return t.mb.gather_nd(x=x, indices=indices, batch_dims=attribute(node, "batch_dims", 0), validate_indices=False)


@operator("Resize")
def _resize(t: Any, node: Any) -> Any:
    scales = t.numbers(given(node, 2))
    nearest = attribute(node, "mode", "nearest") == "nearest" and attribute(node, "nearest_mode", "") == "floor"
    if not nearest or attribute(node, "coordinate_transformation_mode", "") != "asymmetric":
        raise refuse(node, "is not nearest, asymmetric and floor")
    if scales is None or len(scales) != 4 or any(scales[:2] != 1) or any(scales != np.floor(scales)):
        raise refuse(node, "does not repeat height and width a whole number of times")
    height, width = map(float, scales[2:])
    return t.mb.upsample_nearest_neighbor(x=t.var(node.inputs[0]), scale_factor_height=height, scale_factor_width=width)


# Quantization


@operator("QuantizeLinear")
def _quantize(t: Any, node: Any) -> Any:
    scale, offset = t.numbers(node.inputs[1]), t.numbers(given(node, 2))
    if scale is None or (given(node, 2) is not None and offset is None):
        raise refuse(node, "has a computed scale")
    dtype = "int8" if offset is None and attribute(node, "output_dtype", 2) == 3 else "uint8" if offset is None else offset.dtype.name
    return t.mb.quantize(input=t.var(node.inputs[0]), output_dtype=dtype, **_affine(node, scale, offset))


@operator("DequantizeLinear")
def _dequantize(t: Any, node: Any) -> Any:
    constant = t.constant(node.inputs[0])
    scale, offset = t.numbers(node.inputs[1]), t.numbers(given(node, 2))
    if scale is None:
        raise refuse(node, "has a computed scale")
    if constant is None:
        return t.mb.dequantize(input=t.var(node.inputs[0]), **_affine(node, scale, offset))
    blocks = _blocks(constant.shape, attribute(node, "axis", 1), scale.shape)
    shift = None if offset is None or not offset.any() else offset.reshape(blocks)
    return Constant(constant.shape, constant.stored, scale.dtype.name, constant.read, scale.reshape(blocks), shift)


def _affine(node: Any, scale: Any, offset: Any) -> dict[str, Any]:
    """Scale, offset where it is not zero, and axis, as MIL takes them: single numbers, or vectors along an axis."""
    if scale.ndim > 1:
        raise refuse(node, "quantizes what is computed by blocks")
    one = scale.size == 1
    found = {"scale": scale.reshape(()) if one else scale}
    if offset is not None and offset.any():
        found["zero_point"] = offset.reshape(()) if one else offset
    return found if one else found | {"axis": np.int32(attribute(node, "axis", 1))}


def _blocks(shape: tuple[int, ...], axis: int, scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales with the rank of their codes: one for all, one for each along an axis, or one for each block."""
    if len(scales) == len(shape) and len(shape) > 1:
        return scales
    if math.prod(scales) == 1:
        return (1,) * len(shape)
    return tuple(length if index == axis % len(shape) else 1 for index, length in enumerate(shape))


# Products and normalizations


@operator("MatMul")
def _matmul(t: Any, node: Any) -> Any:
    x, weight = t.var(node.inputs[0]), t.constant(node.inputs[1])
    if weight is None or len(weight.shape) != 2 or x.rank > 3:
        return t.mb.matmul(x=x, y=t.weight(node.inputs[1]))
    bias = _following_bias(t, node, weight.shape[1])
    return _linear(t, x, t.weight(node.inputs[1], (1, 0)), bias)


@operator("Gemm")
def _gemm(t: Any, node: Any) -> Any:
    if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
        raise refuse(node, "scales or transposes")
    x, bias = t.var(node.inputs[0]), given(node, 2)
    if t.constant(node.inputs[1]) is None or (bias is not None and t.constant(bias) is None):
        raise refuse(node, "multiplies by what is computed")
    order = () if attribute(node, "transB", 0) else (1, 0)
    return _linear(t, x, t.weight(node.inputs[1], order), None if bias is None else t.var(bias))


def _linear(t: Any, x: Any, weight: Any, bias: Any) -> Any:
    return t.mb.linear(x=x, weight=weight) if bias is None else t.mb.linear(x=x, weight=weight, bias=bias)


def _following_bias(t: Any, node: Any, length: int) -> Any:
    """The vector that the only reader of a product adds to it, which is then part of the product."""
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output() or uses[0][0].op_type != "Add":
        return None
    add = uses[0][0]
    other = add.inputs[1 - uses[0][1]]
    constant = t.constant(other)
    if constant is None or constant.shape != (length,):
        return None
    t.follow(product, add.outputs[0])
    return t.var(other)


@operator("Conv")
def _conv(t: Any, node: Any) -> Any:
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        raise refuse(node, "pads by itself")
    bias = given(node, 2)
    weight = t.weight(node.inputs[1])
    spatial = weight.rank - 2
    pads = list(attribute(node, "pads", [0] * 2 * spatial))
    settings = {
        "strides": list(attribute(node, "strides", [1] * spatial)),
        "dilations": list(attribute(node, "dilations", [1] * spatial)),
        "groups": attribute(node, "group", 1),
        "pad_type": "custom",
        "pad": [length for axis in range(spatial) for length in (pads[axis], pads[axis + spatial])],
    }
    if bias is not None:
        settings["bias"] = t.var(bias)
    return t.mb.conv(x=t.var(node.inputs[0]), weight=weight, **settings)


@operator("LayerNormalization")
def _layer_norm(t: Any, node: Any) -> Any:
    x, bias = t.var(node.inputs[0]), given(node, 2)
    axis = attribute(node, "axis", -1) % x.rank
    found = {"gamma": t.var(node.inputs[1])} | ({} if bias is None else {"beta": t.var(bias)})
    epsilon = _like(t, x, attribute(node, "epsilon", 1e-5))
    return t.mb.layer_norm(x=x, axes=list(range(axis - x.rank, 0)), epsilon=epsilon, **found)


@operator("GroupNormalization")
def _group_norm(t: Any, node: Any) -> Any:
    """Means over the positions of each channel, then over the channels of each group: no shape depends on how many positions there are."""
    x, groups = t.var(node.inputs[0]), attribute(node, "num_groups", 1)
    centred = t.mb.sub(x=x, y=_group_means(t, x, groups))
    epsilon = attribute(node, "epsilon", 1e-5)
    if x.dtype == t.mb.types.fp16:
        normal = _normal_in_half(t, centred, groups, epsilon)
    else:
        root = t.mb.rsqrt(x=_group_means(t, t.mb.square(x=centred), groups), epsilon=_like(t, x, epsilon))
        normal = t.mb.mul(x=centred, y=root)
    scale, bias = (t.numbers(value) for value in node.inputs[1:3])
    if scale is None or bias is None:
        raise refuse(node, "scales by what is computed")
    along = (-1, *[1] * (x.rank - 2))
    return t.mb.add(x=t.mb.mul(x=normal, y=scale.reshape(along)), y=bias.reshape(along))


def _normal_in_half(t: Any, centred: Any, groups: int, epsilon: float) -> Any:
    """Divided by the group's greatest value first: from 256 on, a square is beyond what 16 bits hold.

    With z = centred / greatest, centred / sqrt(mean(centred ** 2) + epsilon) is z / sqrt(mean(z ** 2) + epsilon / greatest ** 2).
    """
    greatest = t.mb.maximum(x=_of_groups(t, t.mb.abs(x=centred), groups, t.mb.reduce_max), y=_like(t, centred, LEAST))
    shares = t.mb.real_div(x=centred, y=greatest)
    share = t.mb.square(x=t.mb.real_div(x=_like(t, centred, math.sqrt(epsilon)), y=greatest))
    variance = t.mb.add(x=_group_means(t, t.mb.square(x=shares), groups), y=share)
    return t.mb.mul(x=shares, y=t.mb.rsqrt(x=variance, epsilon=_like(t, centred, 1e-7)))


def _group_means(t: Any, x: Any, groups: int) -> Any:
    return _of_groups(t, x, groups, t.mb.reduce_mean)


def _of_groups(t: Any, x: Any, groups: int, reduce: Any) -> Any:
    """[batch, channels, 1, ...]: for each channel what its group is reduced to."""
    channels = int(x.shape[1])
    found = reduce(x=x, axes=list(range(2, x.rank)), keep_dims=True)
    found = reduce(x=t.mb.reshape(x=found, shape=[-1, groups, channels // groups]), axes=[2], keep_dims=True)
    return t.mb.reshape(x=t.mb.tile(x=found, reps=[1, 1, channels // groups]), shape=[-1, channels] + [1] * (x.rank - 2))


@operator("Attention")
def _attention(t: Any, node: Any) -> Any:
    """Heads that share keys and values are moved into the sequence, so that neither is repeated."""
    if given(node, 4) is not None or any(output.uses() for output in node.outputs[1:]):
        raise refuse(node, "keeps its past itself")
    if attribute(node, "is_causal", 0) or attribute(node, "softcap", 0.0):
        raise refuse(node, "is causal by itself or caps its scores")
    query, key, value = (t.var(found) for found in node.inputs[:3])
    mask = None if given(node, 3) is None else t.var(node.inputs[3])
    if query.rank != 4:
        raise refuse(node, "has heads packed into one axis")
    heads, size, shared = int(query.shape[1]), int(query.shape[3]), int(key.shape[1])
    wanted = attribute(node, "scale", size**-0.5) * math.sqrt(size)
    if abs(wanted - 1) > 1e-6:
        query = t.mb.mul(x=query, y=_like(t, query, wanted))
    if heads != shared:
        query = _reshaped(t, query, [_kept(t, query, 0), shared, -1, size])
        if mask is not None and mask.rank >= 2:
            if mask.rank > 2 and mask.shape[-3] != 1:
                raise refuse(node, "has a mask for each head")
            mask = t.mb.tile(x=mask, reps=[1] * (mask.rank - 2) + [heads // shared, 1])
    inputs = {"query": query, "key": key, "value": value} | ({} if mask is None else {"attn_mask": mask})
    result = t.mb.scaled_dot_product_attention(**inputs)
    return result if heads == shared else _reshaped(t, result, [_kept(t, query, 0), heads, -1, int(value.shape[3])])


@operator("TensorScatter")
def _tensor_scatter(t: Any, node: Any) -> Any:
    """Write new keys or values into a state where they stay, and read it."""
    state = t.states.get(node.inputs[0])
    if state is None:
        raise refuse(node, "writes into what is no state")
    axis = attribute(node, "axis", -2)
    new, start = t.var(node.inputs[1]), t.var(node.inputs[2])
    rank = new.rank
    axis %= rank
    cache = t.mb.read_state(input=state)
    count = t.mb.slice_by_index(x=t.mb.shape(x=new), begin=[axis], end=[axis + 1])
    others = [index != axis for index in range(rank)]
    begin = _placed(t, node, [0] * rank, [axis], start)
    end = _placed(t, node, [0] * rank, [axis], t.mb.add(x=start, y=count))
    update = new if new.dtype == cache.dtype else t.mb.cast(x=new, dtype="fp16")
    whole = t.mb.slice_update(x=cache, update=update, begin=begin, end=end, begin_mask=others, end_mask=others)
    kept = t.mb.coreml_update_state(state=state, value=whole)
    t.updated.add(node.outputs[0])
    return kept if kept.dtype == new.dtype else t.mb.cast(x=kept, dtype=t.mb.types.builtin_to_string(new.dtype))
