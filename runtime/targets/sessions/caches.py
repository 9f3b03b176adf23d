"""Keys and values of one sequence in buffers on the device of a session: [batch, heads, capacity, size] each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from runtime.bundle.signature import State
from runtime.errors import EngineError
from runtime.targets.sessions.sessions import Device, sdk

FIRST_CAPACITY: Final = 256
"""Positions that a cache which grows holds at first."""
BFLOAT16: Final = 16
"""ONNX's number of a type that numpy lacks."""
TYPES: Final[Mapping[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": BFLOAT16,
}


class Cache:
    """The buffers of one slot, by the name of the past. `types` are those of the session's inputs; `longest` bounds the
    growth.
    """

    def __init__(
        self, states: tuple[State, ...], batch: int, device: Device, types: Mapping[str, str], longest: int
    ) -> None:
        self.states, self.batch, self.device, self.types, self.longest = states, batch, device, types, longest
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
            wide = any(
                TYPES[self.types[state.past.name]] == BFLOAT16 for state in self.states
            )  # cannot be copied to grow
            self.capacity = (
                self.longest if wide else min(self.longest, max(FIRST_CAPACITY, 1 << (length - 1).bit_length()))
            )
            self.values = {state.past.name: self._grown(state) for state in self.states}
        return self.values

    def whole(self) -> dict[str, Any]:
        """Buffers of the whole length, zero at first: what a mask leaves out is multiplied by 0 all the same."""
        self.capacity = self.longest
        if not self.values:
            self.values = self.like()
        return self.values

    def like(self) -> dict[str, Any]:
        """Other buffers like these."""
        other = Cache(self.states, self.batch, self.device, self.types, self.longest)
        other.capacity = self.longest
        return {state.past.name: other._grown(state) for state in self.states}

    def _grown(self, state: State) -> Any:
        shape = state.past.shape({"batch": self.batch, "past": self.capacity})
        dtype = TYPES[self.types[state.past.name]]
        make = sdk().OrtValue
        if dtype == BFLOAT16:
            return make.ortvalue_from_shape_and_type(shape, dtype, self.device.memory, self.device.index)
        grown = np.zeros(shape, dtype)
        if state.past.name in self.values:
            held = self.values[state.past.name].numpy()
            grown[:, :, : held.shape[2]] = held
        return make.ortvalue_from_numpy(grown, self.device.memory, self.device.index)
