"""Constants of a canonical graph that is translated to a package. They are read from the bundle's file one at a time,
when the package is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.errors import EngineError

COMPRESSED: Final = 4096
"""Float constants of at least this many elements keep the 16 bits that they are stored in where the graph computes in
32.
"""


@dataclass(frozen=True)
class Constant:
    """An initializer after dequantization and casts: (codes - offset) * scale, cast to `dtype`.

    `stored` is "int4" or a numpy dtype's name. `scale` and `offset` have the rank of the codes; each of their elements
    belongs to a block of codes.
    """

    shape: tuple[int, ...]
    stored: str
    dtype: str
    read: Callable[[], Array]
    scale: Array | None = None
    offset: Array | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Elements along each axis that share a scale."""
        assert self.scale is not None
        return tuple(length // count for length, count in zip(self.shape, self.scale.shape, strict=True))

    def cast(self, dtype: str) -> Constant:
        scale = None if self.scale is None else self.scale.astype(dtype)
        return replace(self, dtype=dtype, scale=scale)

    def transposed(self, order: tuple[int, ...]) -> Constant:
        """The constant with its axes in another order, still unread."""

        def moved(array: Array | None) -> Array | None:
            return None if array is None else array.transpose(order)

        shape = tuple(self.shape[axis] for axis in order)
        return replace(
            self,
            shape=shape,
            read=lambda: self.read().transpose(order),
            scale=moved(self.scale),
            offset=moved(self.offset),
        )

    def array(self) -> Array:
        """The values."""
        codes = self.read()
        if self.scale is None:
            return codes.astype(self.dtype)
        return dequantize(codes, self.scale, self.offset)


def dequantize(codes: Array, scale: Array, offset: Array | None) -> Array:
    """(codes - offset) * scale, each scale for a block of codes, in the type of the scales."""
    values: Any = codes.astype(scale.dtype)
    for axis, (length, count) in enumerate(zip(codes.shape, scale.shape, strict=True)):
        if 1 < count < length:
            scale = np.repeat(scale, length // count, axis)
            offset = None if offset is None else np.repeat(offset, length // count, axis)
    if offset is not None:
        values = values - offset.astype(scale.dtype)
    product: Array = values * scale
    return product


def of_tensor(tensor: Any) -> Constant:
    """The constant of an onnx_ir tensor, which is mapped only while it is read. Raises EngineError for types that Core
    ML does not have.
    """
    stored = tensor.dtype.name.lower()
    stored = {"float": "float32", "double": "float64"}.get(stored, stored)
    if stored not in ("float32", "float16", "float64", "int64", "int32", "int8", "uint8", "int4", "bool"):
        raise EngineError(f"tensor '{tensor.name}' is {stored}, which Core ML has no form of: choose another --quant")

    def read() -> Array:
        values: Array = tensor.numpy()
        copy: Array = values.astype(np.int8) if stored == "int4" else values.copy()
        del values
        if hasattr(tensor, "release"):
            tensor.release()
        return copy

    return Constant(tuple(tensor.shape), stored, "int8" if stored == "int4" else stored, read)


class Deferred(np.ndarray[Any, Any]):
    """A placeholder for a large constant in a MIL program. It has a shape and a dtype; the values are read when
    coremltools flattens it to write it.

    Every other operation raises NotImplementedError, so that coremltools' constant folding treats the value as unknown.
    """

    read: Callable[[], Array]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any, read: Callable[[], Array]) -> Deferred:
        array = np.broadcast_to(np.zeros((), dtype), shape).view(cls)
        array.read = read
        return array

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Deferred):
            raise NotImplementedError

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def flatten(self, order: Any = "C") -> Any:
        values = self.read()
        assert values.shape == self.shape
        return np.ascontiguousarray(values.astype(self.dtype, copy=False)).reshape(-1)
