"""What MIL's operations compute, in numpy: each takes its inputs by name, floats in 32 bits, and returns what it gives.

Written from the operations' documentation (coremltools 9.0, iOS 15 to 18), not from the code that folds constants in coremltools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from runtime.mil.constants import dequantize
from runtime.signature import Array

Kernel = Callable[..., Any]
KERNELS: Final[dict[str, Kernel]] = {}
MOVES: Final = frozenset(
    ("concat", "const", "expand_dims", "gather", "gather_nd", "identity", "read_state", "reshape", "select", "shape", "slice_by_index")
) | frozenset(("slice_update", "split", "squeeze", "tile", "transpose", "upsample_nearest_neighbor"))
"""Operations that compute nothing: 16-bit floats go through them as they are."""
PATCHES: Final = 1 << 25
"""Elements of the patches that a convolution lays out at once (128 MB)."""
TYPES: Final[Mapping[str, str]] = {"fp16": "float16", "fp32": "float32"}


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Register what an operation computes."""

    def add(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return add


def _elementwise() -> dict[str, Kernel]:
    unary: dict[str, Any] = {
        **{"abs": np.abs, "ceil": np.ceil, "cos": np.cos, "exp": np.exp, "floor": np.floor, "logical_not": np.logical_not},
        **{"sin": np.sin, "sqrt": np.sqrt, "square": np.square, "tanh": np.tanh, "identity": np.asarray},
    }
    binary: dict[str, Any] = {
        **{"add": np.add, "equal": np.equal, "floor_div": np.floor_divide, "greater": np.greater, "greater_equal": np.greater_equal},
        **{"less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and, "logical_or": np.logical_or},
        **{"maximum": np.maximum, "minimum": np.minimum, "mul": np.multiply, "not_equal": np.not_equal, "pow": np.power},
        **{"real_div": np.divide, "sub": np.subtract},
    }
    made: dict[str, Kernel] = {name: (lambda x, of=function: of(x)) for name, function in unary.items()}
    return made | {name: (lambda x, y, of=function: of(x, y)) for name, function in binary.items()}


KERNELS.update(_elementwise())


@kernel("relu")
def _relu(x: Array) -> Any:
    return np.maximum(x, 0)


@kernel("sigmoid")
def _sigmoid(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


@kernel("silu")
def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


@kernel("rsqrt")
def _rsqrt(x: Any, epsilon: Any) -> Any:
    return 1 / np.sqrt(x + epsilon)


@kernel("erf")
def erf(x: Any) -> Any:
    """The error function within 1.2e-7 (Numerical Recipes, erfc by a Chebyshev fit; W. H. Press et al., section 6.2)."""
    size = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.5 * size)
    terms = (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277)
    rest = t * np.exp(-size * size + np.polynomial.polynomial.polyval(t, terms))
    return np.copysign(1 - rest, x).astype(x.dtype)


@kernel("gelu")
def _gelu(x: Any, mode: str) -> Any:
    if mode == "EXACT":
        return x * 0.5 * (1 + erf(x * np.float32(0.5**0.5)))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + 0.044715 * x**3)))
    return x * _sigmoid(1.702 * x)


@kernel("softmax")
def softmax(x: Any, axis: int) -> Any:
    scores = x - x.max(axis=axis, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=axis, keepdims=True)
    return scores


@kernel("select")
def _select(cond: Array, a: Array, b: Array) -> Any:
    return np.where(cond, a, b)


@kernel("cast")
def _cast(x: Array, dtype: str) -> Any:
    return x.astype(TYPES.get(dtype, dtype))


@kernel("reduce_mean")
def _reduce_mean(x: Any, axes: Array, keep_dims: bool) -> Any:
    return x.mean(axis=tuple(axes), keepdims=bool(keep_dims))


@kernel("reduce_sum")
def _reduce_sum(x: Any, axes: Array, keep_dims: bool) -> Any:
    return x.sum(axis=tuple(axes), keepdims=bool(keep_dims))


@kernel("reduce_max")
def _reduce_max(x: Any, axes: Array, keep_dims: bool) -> Any:
    return x.max(axis=tuple(axes), keepdims=bool(keep_dims))


@kernel("reduce_min")
def _reduce_min(x: Any, axes: Array, keep_dims: bool) -> Any:
    return x.min(axis=tuple(axes), keepdims=bool(keep_dims))


@kernel("reduce_argmax")
def _reduce_argmax(x: Array, axis: int, keep_dims: bool, output_dtype: str = "int32") -> Any:
    return x.argmax(axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype)


# Shapes


@kernel("shape")
def _shape(x: Array) -> Any:
    return np.array(x.shape, np.int32)


@kernel("reshape")
def _reshape(x: Array, shape: Array) -> Any:
    """0 stands for the length of that axis, counted from the last (iOS 17)."""
    lengths = [int(length) for length in shape]
    from_end = len(x.shape) - len(lengths)
    kept = [x.shape[axis + from_end] if length == 0 and axis + from_end >= 0 else length or 1 for axis, length in enumerate(lengths)]
    return x.reshape(kept)


@kernel("transpose")
def _transpose(x: Array, perm: Array) -> Any:
    return x.transpose([int(axis) for axis in perm])


@kernel("expand_dims")
def _expand_dims(x: Array, axes: Array) -> Any:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


@kernel("squeeze")
def _squeeze(x: Array, axes: Array) -> Any:
    return np.squeeze(x, tuple(int(axis) for axis in axes))


@kernel("concat")
def _concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Any:
    assert not interleave
    return np.concatenate([np.atleast_1d(value) for value in values], int(axis))


@kernel("split")
def _split(x: Array, axis: int, num_splits: int | None = None, split_sizes: Array | None = None) -> Any:
    return np.split(x, int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1], int(axis))  # type: ignore[arg-type]


@kernel("tile")
def _tile(x: Array, reps: Array) -> Any:
    return np.tile(x, [int(count) for count in reps])


@kernel("fill")
def _fill(shape: Array, value: Any) -> Any:
    return np.full([int(length) for length in shape], value, value.dtype)


@kernel("range_1d")
def _range(start: Any, end: Any, step: Any) -> Any:
    return np.arange(start, end, step, start.dtype)


def _slices(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice, ...]:
    no = [False] * x.ndim
    assert squeeze_mask is None or not any(squeeze_mask)
    steps = [1] * x.ndim if stride is None else [int(step) for step in stride]
    starts = [None if free else int(at) for at, free in zip(begin, no if begin_mask is None else begin_mask, strict=True)]
    ends = [None if free else int(at) for at, free in zip(end, no if end_mask is None else end_mask, strict=True)]
    return tuple(map(slice, starts, ends, steps))


@kernel("slice_by_index")
def _slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Any:
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@kernel("slice_update")
def _slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Any:
    place = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[place].shape != update.shape:
        raise ValueError(f"{update.shape} does not fit into {x[place].shape}")
    changed = x.copy()
    changed[place] = update
    return changed


@kernel("gather")
def _gather(x: Array, indices: Any, axis: int, batch_dims: int = 0, validate_indices: bool = False) -> Any:
    assert not batch_dims
    return np.take(x, indices, int(axis))


@kernel("gather_nd")
def _gather_nd(x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool = False) -> Any:
    assert not batch_dims
    return x[tuple(np.moveaxis(indices, -1, 0))]


@kernel("upsample_nearest_neighbor")
def _upsample(x: Array, scale_factor_height: Any, scale_factor_width: Any) -> Any:
    return x.repeat(int(scale_factor_height), -2).repeat(int(scale_factor_width), -1)


# Quantization


@kernel("constexpr_blockwise_shift_scale")
def _blockwise(data: Array, scale: Array, offset: Array | None = None) -> Any:
    return dequantize(data, scale, offset)


@kernel("constexpr_cast")
def _constexpr_cast(source_val: Array, output_dtype: str) -> Any:
    return source_val.astype(TYPES[output_dtype])


def _along(parameter: Any, input: Any, axis: Any) -> Any:
    """A number for all, or one for each along the axis."""
    return (
        parameter if np.ndim(parameter) == 0 else parameter.reshape([-1 if at == int(axis) % input.ndim else 1 for at in range(input.ndim)])
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


# Products and normalizations


@kernel("matmul")
def _matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


@kernel("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    product = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


@kernel("layer_norm")
def _layer_norm(x: Any, axes: Array, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Any:
    where = tuple(int(axis) for axis in axes)
    centred = x - x.mean(axis=where, keepdims=True)
    normal = centred / np.sqrt(np.square(centred).mean(axis=where, keepdims=True) + epsilon)
    normal = normal if gamma is None else normal * gamma
    return normal if beta is None else normal + beta


@kernel("conv")
def _conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: int = 1,
) -> Any:
    """In two dimensions, as a product of weights with patches."""
    assert x.ndim == 4 and pad_type in ("valid", "custom")
    top, bottom, left, right = (0, 0, 0, 0) if pad is None or pad_type == "valid" else map(int, pad)
    (down, across), (dy, dx) = ([1, 1] if given is None else [int(step) for step in given] for given in (strides, dilations))
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    batch, _, height, width = x.shape
    filters, inner, kh, kw = weight.shape
    rows, columns = (height - dy * (kh - 1) - 1) // down + 1, (width - dx * (kw - 1) - 1) // across + 1
    result = np.empty((batch, filters, rows, columns), np.float32)
    at_once = max(1, PATCHES // (inner * kh * kw * columns))
    flat = weight.reshape(groups, filters // groups, -1)
    for image in range(batch):
        for group in range(groups):
            part = x[image, group * inner : (group + 1) * inner]
            windows = _windows(part, dy * (kh - 1) + 1, dx * (kw - 1) + 1)
            windows = windows[:, ::down, ::across, ::dy, ::dx].transpose(0, 3, 4, 1, 2)
            own = slice(group * (filters // groups), (group + 1) * (filters // groups))
            for row in range(0, rows, at_once):
                patches = windows[:, :, :, row : row + at_once].reshape(inner * kh * kw, -1)
                result[image, own, row : row + at_once] = (flat[group] @ patches).reshape(filters // groups, -1, columns)
    if bias is not None:
        result += bias[:, None, None]
    return result


def _windows(x: Array, height: int, width: int) -> Array:
    """[channels, rows, columns, height, width]: what lies behind a window of that size at each place of x [channels, ...], as a view."""
    view: Any = np.lib.stride_tricks.sliding_window_view
    windows: Array = view(x, (height, width), (1, 2))
    return windows


@kernel("scaled_dot_product_attention")
def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None) -> Any:
    """Head by head: all scores at once may be gigabytes."""
    lead = query.shape[:-2]
    result = np.empty((*lead, query.shape[-2], value.shape[-1]), np.float32)
    if attn_mask is not None:
        attn_mask = np.where(attn_mask, np.float32(0), np.float32(-np.inf)) if attn_mask.dtype == bool else attn_mask
        attn_mask = np.broadcast_to(attn_mask, (*lead, query.shape[-2], key.shape[-2]))
    for index in np.ndindex(lead):
        scores = query[index] @ key[index].T
        scores *= np.float32(query.shape[-1] ** -0.5)
        if attn_mask is not None:
            scores += attn_mask[index]
        result[index] = softmax(scores, -1) @ value[index]
    return result
