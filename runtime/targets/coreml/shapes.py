"""The lengths that a package accepts: the settings of `compile_with`, input types made from them, and the shapes that a
package declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from runtime.bundle.signature import Dim, Signature
from runtime.errors import InvalidInput
from runtime.settings import Texts
from runtime.targets.coreml.sdk import coremltools
from runtime.targets.lowering.static_cache import capacity

Lengths = Mapping[str, tuple[int, int, int]]
"""Least, usual and greatest length of each varying dim."""


class CoreMLSettings(Texts):
    """Settings of `compile_with`, as texts from a command line.

    `precision`: "float16" or "float32"; by default the bundle's `compute`. Caches are always float16. `shapes`: "range"
    accepts all lengths between the least and the greatest, "fixed" the usual ones alone, which allows the Neural Engine
    take part, "enumerated" three sets: all the least, all the usual, all the greatest. `lengths`: other lengths than
    the signature's, "batch=2,height=32:64:96" (one, or min:opt:max). `context`: positions that a decoder's cache holds;
    by default the model's whole context.
    """

    precision: Literal["", "float32", "float16"] = ""
    shapes: Literal["range", "fixed", "enumerated"] = "range"
    lengths: Mapping[str, tuple[int, int, int]] = Field(default_factory=dict)
    context: int = Field(default=0, ge=0)

    @field_validator("lengths", mode="before")
    @classmethod
    def _lengths(cls, text: str) -> dict[str, tuple[int, int, int]]:
        found = {}
        for part in text.split(","):
            name, _, numbers = part.strip().partition("=")
            lengths = numbers.split(":")
            if not name or len(lengths) not in (1, 3) or not all(map(str.isdecimal, lengths)):
                raise ValueError(f"has '{part}', expected NAME=LENGTH or NAME=MIN:OPT:MAX, such as batch=1:2:8")
            low, usual, high = map(int, lengths * (3 // len(lengths)))
            if not 0 < low <= usual <= high:
                raise ValueError(f"has '{part}', expected 0 < MIN <= OPT <= MAX")
            found[name] = low, usual, high
        return found


def lengths_of(signature: Signature, settings: CoreMLSettings) -> dict[str, tuple[int, int, int]]:
    """The lengths of each dim that varies between calls. Rows of a decoder are computed one by one, on a cache of their
    own.

    Raises InvalidInput for lengths that the signature does not allow.
    """
    dims = {
        dim.name: dim for tensor in signature.inputs for dim in tensor.dims if isinstance(dim, Dim) and not dim.sum_of
    }
    for name, (low, usual, high) in settings.lengths.items():
        if name not in dims:
            raise InvalidInput("lengths", f"names {name}, expected {' or '.join(sorted(dims))}")
        dim = dims[name]
        if low < dim.min or high > dim.max or any(length % dim.multiple for length in (low, usual, high)):
            of = f", multiples of {dim.multiple}" if dim.multiple > 1 else ""
            raise InvalidInput("lengths", f"has {name}={low}:{usual}:{high}, expected {dim.min} to {dim.max}{of}")
    found = {
        name: settings.lengths.get(name, (max(dim.min, dim.multiple), max(dim.opt, 1), dim.max))
        for name, dim in dims.items()
    }
    if signature.port is not None:
        found[signature.port.batch] = (1, 1, 1)
        if signature.port.sequence not in settings.lengths:
            found[signature.port.sequence] = (1, *_steps(capacity(signature, settings.context)))
    if settings.shapes == "fixed":
        found = {name: (usual, usual, usual) for name, (_, usual, _) in found.items()}
    return found if signature.port is not None else signature.ranges(found)


def _steps(context: int) -> tuple[int, int]:
    return min(64, context), context


def symbols(lengths: Lengths) -> dict[str, Any]:
    """Input dims for the translator: a number for each dim of one length, a RangeDim for those that vary."""
    ct = coremltools()
    return {
        name: low if low == high else ct.RangeDim(low, high, default=usual)
        for name, (low, usual, high) in lengths.items()
    }


def input_types(
    inputs: Mapping[str, tuple[Any, Any]], lengths: Lengths, dims: Mapping[str, Any], enumerated: bool
) -> list[Any]:
    """coremltools' types of the inputs whose shape varies. `inputs` gives the dims (numbers and names) and the dtype of
    each.
    """
    ct = coremltools()
    found = []
    for name, (shape, dtype) in inputs.items():
        named = [dims[dim] if isinstance(dim, str) else dim for dim in shape]
        if all(isinstance(dim, int) for dim in named):
            continue
        sets = [tuple(lengths[dim][index] if isinstance(dim, str) else dim for dim in shape) for index in range(3)]
        varying = (
            ct.EnumeratedShapes(shapes=list(dict.fromkeys(sets)), default=sets[1])
            if enumerated
            else ct.Shape(tuple(named))
        )
        found.append(ct.TensorType(name=name, shape=varying, dtype=np.float32 if dtype == "float32" else np.int32))
    return found


class Taken:
    """The shapes that an input of a package accepts, read from its description."""

    def __init__(self, feature: Any) -> None:
        array = feature.type.multiArrayType
        flexible = array.WhichOneof("ShapeFlexibility")
        self.sets = (
            [tuple(map(int, one.shape)) for one in array.enumeratedShapes.shapes]
            if flexible == "enumeratedShapes"
            else []
        )
        if flexible == "shapeRange":
            self.ranges = [(int(size.lowerBound), int(size.upperBound)) for size in array.shapeRange.sizeRanges]
        else:
            self.ranges = [(int(length), int(length)) for length in array.shape]

    def __contains__(self, shape: tuple[int, ...]) -> bool:
        if self.sets:
            return shape in self.sets
        return len(shape) == len(self.ranges) and all(
            low <= length <= high for length, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def __str__(self) -> str:
        if self.sets:
            return " or ".join(map(str, self.sets))
        return f"({', '.join(f'{low}' if low == high else f'{low} to {high}' for low, high in self.ranges)})"

    def longest(self, axis: int, length: int) -> int:
        """The greatest accepted length of an axis up to the given one; 0 when all are greater."""
        if self.sets:
            return max((shape[axis] for shape in self.sets if shape[axis] <= length), default=0)
        low, high = self.ranges[axis]
        return min(length, high) if low <= length else 0
