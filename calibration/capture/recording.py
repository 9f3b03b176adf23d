"""What one request's calls leave behind: the inputs each submodel got, and the choice of those that are kept.

Which of a request's calls are kept depends on the seed and the request's number alone, never on what other requests
did, so requests can be captured in any order and in several goes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import Slot
from runtime.pipeline import Call, Outputs, Pipeline, tap

Inputs = dict[str, Array]


@dataclass(frozen=True)
class Quota:
    """How many calls of each submodel are kept in all, spread evenly over the requests. `seed` decides which."""

    limit: int
    requests: int
    seed: int

    def positions(self, submodel: str, request: int, calls: int) -> list[int]:
        """Which of the `calls` that the submodel got in this request are kept, ascending; `request` counts from 0.

        Stratified: the requests take turns through one random order of the positions, so that over all of them each
        position, which for a denoiser is a noise level, is kept equally often, give or take one.
        """
        if not calls:
            return []
        first, last = (number * self.limit // self.requests for number in (request, request + 1))
        order = np.random.default_rng([self.seed, zlib.crc32(submodel.encode()), calls]).permutation(calls)
        return sorted({int(order[turn % calls]) for turn in range(first, min(last, first + calls))})


class Recorder:
    """The inputs of one request's calls by submodel, copied as they go by. Other submodels are left out.

    Calls that continue a slot become one call from an empty cache: see `Continued`. Memory is that of one request's
    inputs.
    """

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        self._signatures = signatures
        self._calls: dict[str, list[Inputs | Continued]] = {name: [] for name in signatures}
        self._slots: dict[tuple[str, Slot], Continued] = {}

    def watch(self, pipeline: Pipeline) -> Pipeline:
        """The same pipeline, its calls recorded."""

        def seen(call: Call, outputs: Outputs) -> Outputs:
            self.offer(call)
            return outputs

        return tap(pipeline, seen)

    def offer(self, call: Call) -> None:
        """Record a copy of the call's inputs."""
        if call.submodel not in self._calls:
            return
        copy = {name: np.array(array) for name, array in call.inputs.items()}
        signature, calls = self._signatures[call.submodel], self._calls[call.submodel]
        if not signature.states:
            calls.append(copy)
            return
        key = call.submodel, call.slot or Slot()
        if key not in self._slots:
            self._slots[key] = Continued(signature)
            calls.append(self._slots[key])
        self._slots[key].add(copy, call.keep)

    def calls(self) -> dict[str, list[Inputs]]:
        """Everything recorded, in the order of each submodel's (first) calls."""
        return {
            submodel: [joined for call in calls if (joined := call.joined() if isinstance(call, Continued) else call)]
            for submodel, calls in self._calls.items()
        }


@dataclass
class Continued:
    """Consecutive calls of one slot, as the one call from an empty cache that computes the same.

    The signature's port says which axes grow. Inputs with an axis of new positions are joined along it; of those with
    an axis of all positions the last one covers everything.
    """

    signature: Signature
    pieces: list[Inputs] = field(default_factory=list)
    length: int = 0
    """Positions held so far."""
    whole: bool = True
    """False once a call continued what was computed before the recording began: its inputs do not show that."""

    def add(self, inputs: Inputs, keep: int | None = None) -> None:
        """Continue with these inputs, `keep` positions of what is held kept first. Raises InvalidInput as
        `Signature.bind` does.
        """
        if keep is not None and keep < self.length:
            self.pieces = [self.signature.cut(self._join(), 0, keep)] if keep else []
            self.length = keep
        lengths, port = self.signature.bind(inputs), self.signature.decoder
        self.length += lengths[port.sequence]
        self.whole &= lengths[port.total] == self.length
        self.pieces.append(inputs)

    def joined(self) -> Inputs | None:
        """All graph inputs of that one call, the states empty; None if the slot was not recorded from its beginning."""
        if not self.whole or not self.pieces:
            return None
        inputs = self._join()
        lengths = self.signature.bind(inputs) | {self.signature.decoder.past: 0}
        return inputs | {
            state.past.name: np.zeros(state.past.shape(lengths), state.past.dtype) for state in self.signature.states
        }

    def _join(self) -> Inputs:
        joined = dict(self.pieces[-1])
        for tensor in self.signature.inputs:
            axis = _axis(tensor, self.signature.decoder.sequence)
            if axis is not None:
                joined[tensor.name] = np.concatenate([piece[tensor.name] for piece in self.pieces], axis)
        return joined


def _axis(tensor: Tensor, name: str) -> int | None:
    """The axis of the dim of that name."""
    return next((axis for axis, dim in enumerate(tensor.dims) if isinstance(dim, Dim) and dim.name == name), None)


def count_positions(kept: Sequence[int], calls: int) -> list[int]:
    """How often each of the positions 0 to `calls` - 1 is among the kept ones."""
    return [int(count) for count in np.bincount(np.array(kept, np.int64), minlength=calls)]
