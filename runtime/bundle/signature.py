"""What goes into a submodel and what comes out: stated once, everything else is derived from it.

ONNX axes, sample inputs, engine shapes, calibration capture and request validation all read the same `Signature`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import InvalidInput

DType = Literal["float32", "float16", "int64", "int32", "bool"]
Array = NDArray[np.generic]


ALL: Final = slice(None)
LONGEST: Final = 1 << 31
"""Elements along one dimension."""


class Dim(BaseModel):
    """A dimension that varies between calls. Dims of the same name are equal within one call. Lengths are in elements.

    `sum_of` names the dims whose lengths add up to this one, as a cache's total is its past and the new sequence.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    min: int = Field(ge=0, le=LONGEST)
    opt: int = Field(ge=0, le=LONGEST)
    max: int = Field(ge=0, le=LONGEST)
    multiple: int = Field(default=1, ge=1, le=LONGEST)
    sum_of: tuple[str, ...] = ()


Values = Literal["normal", "positions", "ones", "below"]


class Tensor(BaseModel):
    """A named array: its dtype and its dims, each a fixed length or a `Dim`.

    `values` says what real ones look like, for samples: standard normal noise, consecutive positions along the last
    axis that end with the longest length, ones, or whole numbers from 0 up to and without `limit`. A `condition` is
    what the rows of a classifier-free guidance batch differ in; in inputs that are none they are the same.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    dtype: DType
    dims: tuple[Annotated[int, Field(ge=0, le=LONGEST)] | Dim, ...]
    values: Values = "normal"
    limit: int = 0
    condition: bool = False

    def shape(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where each varying dim has the length given under its name."""
        return tuple(lengths[dim.name] if isinstance(dim, Dim) else dim for dim in self.dims)

    def sample(self, lengths: Mapping[str, int], rng: np.random.Generator) -> Array:
        """A likely value of this tensor at the given lengths."""
        shape = self.shape(lengths)
        if self.values == "normal":
            array: Array = rng.standard_normal(shape)
        elif self.values == "positions":
            array = np.broadcast_to(np.arange(shape[-1]) + lengths.get("past", 0), shape)
        elif self.values == "ones":
            array = np.ones(shape)
        else:
            array = rng.integers(0, self.limit, shape)
        return array.astype(self.dtype)


class State(BaseModel):
    """An array that an engine keeps between calls of one slot, such as a layer's keys: read as `past`, written as
    `present`.

    `axis` is the one that grows, from length 0 at the start of a slot. `window` is how many positions the attention
    that reads it sees, the newest included; 0 is all there are.
    """

    model_config = ConfigDict(frozen=True)
    past: Tensor
    present: Tensor
    axis: int
    window: int = Field(default=0, ge=0)


class Signature(BaseModel):
    """Inputs, outputs and states of one submodel. `inputs` and `outputs` are what a caller sees; states belong to the
    engine.
    """

    model_config = ConfigDict(frozen=True)
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[State, ...] = ()

    @property
    def graph_inputs(self) -> tuple[Tensor, ...]:
        """Every input of the ONNX graph, states included, in order."""
        return self.inputs + tuple(state.past for state in self.states)

    @property
    def graph_outputs(self) -> tuple[Tensor, ...]:
        """Every output of the ONNX graph, states included, in order."""
        return self.outputs + tuple(state.present for state in self.states)

    @property
    def windows(self) -> tuple[int, ...]:
        """The limits of attention that occur, each once, in rising order; 0 where some layer has none."""
        return tuple(sorted({state.window for state in self.states}))

    @property
    def dims(self) -> dict[str, Dim]:
        """Every varying dim by name."""
        return {dim.name: dim for tensor in self.graph_inputs for dim in tensor.dims if isinstance(dim, Dim)}

    def lengths(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """The length of each varying dim of the inputs, unchecked; see `bind`."""
        return {
            dim.name: length
            for tensor in self.inputs
            for dim, length in zip(tensor.dims, inputs[tensor.name].shape, strict=True)
            if isinstance(dim, Dim)
        }

    def cut(self, inputs: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        """The part of a decoder's call that is about its new positions from `start` to `stop`: views of the arrays.

        Dims named "sequence" are the new positions, those named "total" all positions there are.
        """
        lengths = self.lengths(inputs)
        parts = {"sequence": slice(start, stop), "total": slice(lengths["total"] - lengths["sequence"] + stop)}
        return {
            tensor.name: inputs[tensor.name][
                tuple(parts.get(dim.name, ALL) if isinstance(dim, Dim) else ALL for dim in tensor.dims)
            ]
            for tensor in self.inputs
        }

    def sample(self, lengths: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
        """Likely values of every graph input at the given lengths: the same for the same seed."""
        rng = np.random.default_rng(seed)
        return {tensor.name: tensor.sample(lengths, rng) for tensor in self.graph_inputs}

    def sample_lengths(self) -> dict[str, int]:
        """Small lengths, all distinct, so that neither a tracer nor a reader takes two dims for the same one."""
        lengths: dict[str, int] = {}
        for dim in sorted(self.dims.values(), key=lambda dim: len(dim.sum_of)):
            length = max(dim.min, 2 * dim.multiple)
            while length in lengths.values() and length + dim.multiple <= dim.max:
                length += dim.multiple
            lengths[dim.name] = sum(lengths[name] for name in dim.sum_of) if dim.sum_of else length
        return lengths

    def bind(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """Check arrays against the signature; return the length of each varying dim.

        Raises InvalidInput naming the tensor when one is missing, unknown, of another dtype, rank or length.
        """
        for name in inputs.keys() - {tensor.name for tensor in self.inputs}:
            raise InvalidInput(name, f"is not an input (expected {', '.join(t.name for t in self.inputs)})")
        lengths: dict[str, int] = {}
        for tensor in self.inputs:
            if tensor.name not in inputs:
                raise InvalidInput(tensor.name, "is missing")
            self._bind_one(tensor, inputs[tensor.name], lengths)
        return lengths

    @staticmethod
    def _bind_one(tensor: Tensor, array: Array, lengths: dict[str, int]) -> None:
        if array.dtype != np.dtype(tensor.dtype):
            raise InvalidInput(tensor.name, f"has dtype {array.dtype}, expected {tensor.dtype}")
        if array.ndim != len(tensor.dims):
            raise InvalidInput(tensor.name, f"has {array.ndim} dims, expected {len(tensor.dims)}")
        for axis, (length, dim) in enumerate(zip(array.shape, tensor.dims, strict=True)):
            if isinstance(dim, int):
                if length != dim:
                    raise InvalidInput(tensor.name, f"axis {axis} is {length}, expected {dim}")
                continue
            if lengths.setdefault(dim.name, length) != length:
                raise InvalidInput(tensor.name, f"{dim.name} is {length} here and {lengths[dim.name]} elsewhere")
            if not dim.min <= length <= dim.max or length % dim.multiple:
                of = f", a multiple of {dim.multiple}" if dim.multiple > 1 else ""
                raise InvalidInput(tensor.name, f"{dim.name} is {length}, expected {dim.min} to {dim.max}{of}")


BATCH: Final = Dim(name="batch", min=1, opt=2, max=64)


def nbytes(tensors: Iterable[Tensor], lengths: Mapping[str, int]) -> int:
    """Bytes that the arrays of these tensors take at the given lengths."""
    return sum(int(np.prod(tensor.shape(lengths))) * np.dtype(tensor.dtype).itemsize for tensor in tensors)
