"""Keys and values of sequences in buffers on the device of a session: [batch, heads, capacity, size] each.

A slot holds some rows of a cache. Slots that are run together hold the rows of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from runtime.bundle.signature import Signature, State
from runtime.errors import EngineError
from runtime.targets.sessions.sessions import Device, sdk

FIRST_CAPACITY: Final = 256
"""Positions that a cache which grows holds at first."""
BFLOAT16: Final = 16
"""ONNX's number of a type that numpy lacks: such buffers are made as numbers of 16 bits, and bound as what they are."""
UINT16: Final = 4
"""ONNX's number of what they are made as."""
TYPES: Final[Mapping[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
}


class Cache:
    """Buffers by the name of the past. `types` are those of the session's inputs; `longest` limits the growth."""

    def __init__(
        self, signature: Signature, batch: int, device: Device, types: Mapping[str, str], longest: int
    ) -> None:
        self.signature, self.batch, self.device, self.types, self.longest = signature, batch, device, types, longest
        self.capacity = 0
        self.values: dict[str, Any] = {}

    def reserve(self, length: int) -> dict[str, Any]:
        """Buffers that hold at least `length` positions, with what they held before. They double, up to the longest."""
        if length > self.longest:
            raise EngineError(
                f"{length} positions do not fit its cache of {self.longest}: say less, or build it with a larger "
                "context"
            )
        if length > self.capacity:
            self.capacity = min(self.longest, max(FIRST_CAPACITY, 1 << (length - 1).bit_length()))
            self.values = {state.past.name: self._grown(state) for state in self.signature.states}
        return self.values

    def whole(self) -> dict[str, Any]:
        """Buffers of the whole length, zero at first, since masked positions are still multiplied by 0."""
        self.capacity = self.longest
        if not self.values:
            self.values = self.like()
        return self.values

    def like(self) -> dict[str, Any]:
        """New buffers like these."""
        other = Cache(self.signature, self.batch, self.device, self.types, self.longest)
        other.capacity = self.longest
        return {state.past.name: other._grown(state) for state in self.signature.states}

    def zeros(self, state: State) -> Any:
        """An array of the shape and type of a buffer."""
        lengths = self.signature.decoder.lengths(past=self.capacity, sequence=0, batch=self.batch)
        return np.zeros(state.past.shape(lengths), TYPES[self.types[state.past.name]])

    def _grown(self, state: State) -> Any:
        grown = self.zeros(state)
        if state.past.name in self.values:
            held = self.values[state.past.name].numpy()
            grown[:, :, : held.shape[2]] = held
        return sdk().OrtValue.ortvalue_from_numpy(grown, self.device.memory, self.device.index)


def bind(binding: Any, place: str, name: str, value: Any, device: Device) -> None:
    """Bind a buffer to an "input" or "output" of a session, in the type that it represents."""
    if value.element_type() == UINT16:
        bound = getattr(binding, f"bind_{place}")
        bound(name, device.memory, device.index, BFLOAT16, value.shape(), value.data_ptr())
    else:
        getattr(binding, f"bind_ortvalue_{place}")(name, value)


class Rows(NamedTuple):
    """The rows of a cache that a slot holds: `batch` rows from `first` on."""

    cache: Cache
    first: int
    batch: int


def covered(parts: Sequence[Rows]) -> Cache | None:
    """The cache whose rows are exactly these, in order; None where there is none."""
    cache, first = parts[0].cache, 0
    for part in parts:
        if part.cache is not cache or part.first != first:
            return None
        first += part.batch
    return cache if first == cache.batch else None


def joined(parts: Sequence[Rows]) -> Cache:
    """A new cache with copies of these rows, in order."""
    first = parts[0].cache
    made = Cache(first.signature, sum(part.batch for part in parts), first.device, first.types, first.longest)
    made.capacity = max(part.cache.capacity for part in parts)
    for state in made.signature.states:
        name = state.past.name
        values = made.zeros(state)
        row = 0
        for part in parts:
            held = part.cache.values[name].numpy()[part.first : part.first + part.batch]
            values[row : row + part.batch, :, : held.shape[2]] = held
            row += part.batch
        made.values[name] = sdk().OrtValue.ortvalue_from_numpy(values, made.device.memory, made.device.index)
    return made
