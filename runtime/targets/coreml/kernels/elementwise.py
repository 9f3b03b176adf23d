"""Operations on each element by itself, and reductions of axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.bundle.signature import Array
from runtime.targets.coreml.kernels.base import KERNELS, TYPES, Kernel, kernel


def _elementwise() -> dict[str, Kernel]:
    unary: dict[str, Any] = {
        **{
            "abs": np.abs,
            "ceil": np.ceil,
            "cos": np.cos,
            "exp": np.exp,
            "floor": np.floor,
            "logical_not": np.logical_not,
        },
        **{"sin": np.sin, "sqrt": np.sqrt, "square": np.square, "tanh": np.tanh, "identity": np.asarray},
    }
    binary: dict[str, Any] = {
        **{
            "add": np.add,
            "equal": np.equal,
            "floor_div": np.floor_divide,
            "greater": np.greater,
            "greater_equal": np.greater_equal,
        },
        **{"less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and, "logical_or": np.logical_or},
        **{
            "maximum": np.maximum,
            "minimum": np.minimum,
            "mul": np.multiply,
            "not_equal": np.not_equal,
            "pow": np.power,
        },
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
    """The error function within 1.2e-7 (Numerical Recipes, erfc by a Chebyshev fit; W. H. Press et al.,
    section 6.2).
    """
    size = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.5 * size)
    terms = (
        -1.26551223,
        1.00002368,
        0.37409196,
        0.09678418,
        -0.18628806,
        0.27886807,
        -1.13520398,
        1.48851587,
        -0.82215223,
        0.17087277,
    )
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
