"""The inputs and outputs of a submodel, stated once.

ONNX axes, sample inputs, engine shapes, calibration capture and request validation are all derived from the same
`Signature`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.errors import InvalidInput

DType = Literal["float32", "float16", "int64", "int32", "bool"]
Array = NDArray[np.generic]


ALL: Final = slice(None)
LONGEST: Final = 1 << 31
"""Elements along one dimension."""


class _Stated(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dim(_Stated):
    """A dimension that varies between calls. Dims of the same name are equal within one call. Lengths are in elements.

    `sum_of` names the dims that this one follows from: its length is the sum of theirs, `times` a factor and divided
    by `over`, rounded up as a strided convolution does. A cache's total is its past and the new sequence. The edge of a
    VAE's picture is 8 times that of the latents it decodes, and the edge of latents an eighth of that of the picture it
    encodes.
    """

    name: str
    min: int = Field(ge=0, le=LONGEST)
    opt: int = Field(ge=0, le=LONGEST)
    max: int = Field(ge=0, le=LONGEST)
    multiple: int = Field(default=1, ge=1, le=LONGEST)
    sum_of: tuple[str, ...] = ()
    times: int = Field(default=1, ge=1, le=LONGEST)
    over: int = Field(default=1, ge=1, le=LONGEST)

    def follows(self, lengths: Mapping[str, int]) -> int:
        """The length that follows from those of `sum_of`."""
        return -(-sum(lengths[name] for name in self.sum_of) * self.times // self.over)


Values = Literal["normal", "small", "positions", "places", "ones", "below"]


class Tensor(_Stated):
    """A named array: its dtype and its dims, each a fixed length or a `Dim`.

    `values` describes real values, for samples: standard normal noise, a twentieth of it, consecutive positions along
    the last axis that continue behind the past, places in the cache (the same, but counted from its beginning), ones,
    or whole numbers from 0 to `limit` - 1. The rows of a classifier-free guidance batch differ only in inputs that are
    a `condition`.
    """

    name: str
    dtype: DType
    dims: tuple[Annotated[int, Field(ge=0, le=LONGEST)] | Dim, ...]
    values: Values = "normal"
    limit: int = 0
    condition: bool = False

    def shape(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where each varying dim has the length given under its name."""
        return tuple(lengths[dim.name] if isinstance(dim, Dim) else dim for dim in self.dims)

    def following(self, source: Tensor, times: int = 1, over: int = 1) -> Tensor:
        """This tensor with dims that follow from those at the same place of another; dims of the same name stay."""
        dims = tuple(
            dim.model_copy(update={"sum_of": (other.name,), "times": times, "over": over})
            if isinstance(dim, Dim) and isinstance(other, Dim) and dim.name != other.name
            else dim
            for dim, other in zip(self.dims, source.dims, strict=True)
        )
        return self.model_copy(update={"dims": dims})

    def sample(self, lengths: Mapping[str, int], rng: np.random.Generator, past: int = 0) -> Array:
        """A likely value of this tensor at the given lengths, behind so many positions of a decoder."""
        shape = self.shape(lengths)
        if self.values in ("normal", "small"):
            array: Array = rng.standard_normal(shape) * (1 if self.values == "normal" else 0.05)
        elif self.values in ("positions", "places"):
            array = np.broadcast_to(past + np.arange(shape[-1]), shape)
        elif self.values == "ones":
            array = np.ones(shape)
        else:
            array = rng.integers(0, self.limit, shape)
        return array.astype(self.dtype)


class State(_Stated):
    """An array that an engine keeps between calls of one slot, such as a layer's keys: read as `past`, written as
    `present`.

    `axis` is the one that grows, from length 0 at the start of a slot. `window` is how many positions the attention
    that reads it sees, the newest included; 0 means all of them.
    """

    past: Tensor
    present: Tensor
    axis: int
    window: int = Field(default=0, ge=0)


class Port(_Stated):
    """How a decoder is called: the names of its inputs, of its output, and of the dims in which they vary.

    `embeddings` [batch, sequence, hidden] are the new positions, `mask` [batch, total] is 0 at padding and 1 elsewhere,
    `positions` [batch, sequence] counts from 0; `logits` [batch, 1, vocabulary] are those of the last new position. A
    slot holds `past` positions before a call and `total` = `past` + `sequence` after it. The defaults are the names of
    transformers.
    """

    embeddings: str = "inputs_embeds"
    mask: str = "attention_mask"
    positions: str = "position_ids"
    logits: str = "logits"
    batch: str = "batch"
    sequence: str = "sequence"
    past: str = "past"
    total: str = "total"

    def lengths(self, past: int, sequence: int, batch: int = 1) -> dict[str, int]:
        """The length of each dim in a call with so many positions before it and so many new ones."""
        return {self.batch: batch, self.sequence: sequence, self.past: past, self.total: past + sequence}


class Signature(_Stated):
    """Inputs, outputs and states of one submodel. `inputs` and `outputs` are what a caller sees; states belong to the
    engine. `port` says how a submodel with states is called.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[State, ...] = ()
    port: Port | None = Field(default_factory=lambda found: Port() if found["states"] else None)
    """Bundles that were built before ports were stated use the names of transformers."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.port is not None:
            port, dims = self.port, self.dims
            known = {tensor.name for tensor in (*self.inputs, *self.outputs)} | dims.keys()
            if unknown := sorted(set(port.model_dump().values()) - known):
                raise ValueError(f"its port names {', '.join(unknown)}, which it has no tensor or dim of")
        for dim in self._following.values():
            for name in dim.sum_of:
                source = self.dims.get(name)
                if source is None or source.sum_of:
                    raise ValueError(
                        f"its dim {dim.name} follows from {name}, expected a dim of its inputs that follows from no "
                        "other"
                    )
        return self

    @property
    def _following(self) -> dict[str, Dim]:
        """Every dim of inputs, outputs and states that follows from others, by name."""
        tensors = (*self.graph_inputs, *self.graph_outputs)
        return {dim.name: dim for tensor in tensors for dim in tensor.dims if isinstance(dim, Dim) and dim.sum_of}

    @property
    def decoder(self) -> Port:
        """The port of a submodel with states."""
        assert self.port is not None, "submodels with states have a port"
        return self.port

    @property
    def longest(self) -> int:
        """Positions that a decoder has at most: its context."""
        return self.dims[self.decoder.total].max

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
        """Every window of its attentions once, in rising order; 0 where some layer has none."""
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

    def complete(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """These lengths, and those of inputs, outputs and states that follow from them."""
        following = self._following.values()
        return {**lengths} | {dim.name: dim.follows(lengths) for dim in following if lengths.keys() >= {*dim.sum_of}}

    def ranges(self, lengths: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        """Least, usual and most lengths of the inputs' dims, given those of the dims that follow from no other."""
        low, usual, high = (self.complete({name: three[i] for name, three in lengths.items()}) for i in range(3))
        return {name: (low[name], usual[name], high[name]) for name in self.dims if name in low}

    def cut(self, inputs: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        """The part of a decoder's call for its new positions from `start` to `stop`, as views of the arrays."""
        port, lengths = self.decoder, self.lengths(inputs)
        past = lengths[port.total] - lengths[port.sequence]
        parts = {port.sequence: slice(start, stop), port.total: slice(past + stop)}
        return {
            tensor.name: inputs[tensor.name][
                tuple(parts.get(dim.name, ALL) if isinstance(dim, Dim) else ALL for dim in tensor.dims)
            ]
            for tensor in self.inputs
        }

    def joined(self, outputs: Collection[Mapping[str, Array]]) -> dict[str, Array]:
        """A decoder's outputs [batch, positions, ...] of consecutive calls as those of one."""
        return {tensor.name: np.concatenate([output[tensor.name] for output in outputs], 1) for tensor in self.outputs}

    def sample(self, lengths: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
        """Likely values of every graph input at the given lengths: the same for the same seed."""
        return self._sampled(self.graph_inputs, lengths, np.random.default_rng(seed))

    def sample_call(self, lengths: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        """Likely values of the inputs that a caller gives."""
        return self._sampled(self.inputs, lengths, rng)

    def _sampled(
        self, tensors: Iterable[Tensor], lengths: Mapping[str, int], rng: np.random.Generator
    ) -> dict[str, Array]:
        past = lengths[self.port.past] if self.port is not None else 0
        return {tensor.name: tensor.sample(lengths, rng, past) for tensor in tensors}

    def sample_lengths(self) -> dict[str, int]:
        """Small lengths, all distinct, so that neither a tracer nor a reader confuses two dims.

        They are above the least, which often is a special case: there a UNet's edge is a multiple of its step.
        """
        lengths: dict[str, int] = {}
        for dim in self.dims.values():
            length = min(max(dim.min, dim.multiple) + dim.multiple, dim.max)
            while length in lengths.values() and length + dim.multiple <= dim.max:
                length += dim.multiple
            if not dim.sum_of:
                lengths[dim.name] = length
        return self.complete(lengths)

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
