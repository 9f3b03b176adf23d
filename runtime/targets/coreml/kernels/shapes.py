"""Operations that move elements or compute with shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.targets.coreml.kernels.base import kernel

MOVES: Final = frozenset(
    (
        "concat",
        "const",
        "expand_dims",
        "gather",
        "gather_nd",
        "identity",
        "read_state",
        "reshape",
        "select",
        "shape",
        "slice_by_index",
    )
) | frozenset(("slice_update", "split", "squeeze", "tile", "transpose", "upsample_nearest_neighbor"))
"""Operations without arithmetic: they pass 16-bit floats on unchanged."""


@kernel("shape")
def _shape(x: Array) -> Any:
    return np.array(x.shape, np.int32)


@kernel("reshape")
def _reshape(x: Array, shape: Array) -> Any:
    """0 means the length of that axis, counted from the last (iOS 17)."""
    lengths = [int(length) for length in shape]
    from_end = len(x.shape) - len(lengths)
    kept = [
        x.shape[axis + from_end] if length == 0 and axis + from_end >= 0 else length or 1
        for axis, length in enumerate(lengths)
    ]
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
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> tuple[slice, ...]:
    no = [False] * x.ndim
    assert squeeze_mask is None or not any(squeeze_mask)
    steps = [1] * x.ndim if stride is None else [int(step) for step in stride]
    starts = [
        None if free else int(at) for at, free in zip(begin, no if begin_mask is None else begin_mask, strict=True)
    ]
    ends = [None if free else int(at) for at, free in zip(end, no if end_mask is None else end_mask, strict=True)]
    return tuple(map(slice, starts, ends, steps))


@kernel("slice_by_index")
def _slice_by_index(x: Array, **where: Any) -> Any:
    return x[_slices(x, **where)]


@kernel("slice_update")
def _slice_update(x: Array, update: Array, **where: Any) -> Any:
    place = _slices(x, **where)
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
