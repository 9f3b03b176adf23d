"""Products, convolutions, normalization and attention."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.targets.coreml.kernels.base import kernel
from runtime.targets.coreml.kernels.elementwise import softmax

PATCHES: Final = 1 << 25
"""Elements of the patches that a convolution builds at once (128 MB)."""


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
    """A convolution in two dimensions, as a product of weights and patches."""
    assert x.ndim == 4 and pad_type in ("valid", "custom")
    top, bottom, left, right = (0, 0, 0, 0) if pad is None or pad_type == "valid" else map(int, pad)
    (down, across), (dy, dx) = (
        [1, 1] if given is None else [int(step) for step in given] for given in (strides, dilations)
    )
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
                result[image, own, row : row + at_once] = (flat[group] @ patches).reshape(
                    filters // groups, -1, columns
                )
    if bias is not None:
        result += bias[:, None, None]
    return result


def _windows(x: Array, height: int, width: int) -> Array:
    """[channels, rows, columns, height, width]: the window at each place of x [channels, ...], as a view."""
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
