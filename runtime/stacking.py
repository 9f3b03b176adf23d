"""Calls of a submodel without states as one call with more rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import divided

Inputs = Mapping[str, Array]
Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each input, by name."""
GAIN: Final = 0.9
"""Calls made as one must take less than this part of what they take one after the other."""
NEARLY: Final = 1.05
"""Fewer calls in one are preferred where each takes at most this much longer: the first of them waits less."""


class Timed(NamedTuple):
    """A measured call: the shapes of its inputs, its seconds, and where and when, as the end of a sentence."""

    shapes: Shapes
    seconds: float
    where: str


@dataclass(frozen=True)
class Rows:
    """The rows of a submodel's calls: `most` in one call. `rowed` are the inputs that have them; the `shared` ones are
    what all rows of a call have in common.
    """

    most: int
    rowed: tuple[str, ...]
    shared: tuple[str, ...]

    @classmethod
    def of(cls, signature: Signature) -> Rows | None:
        """The first dim of every output counts rows. None where there is no such dim, or where calls have states."""
        first = {tensor.dims[0] if tensor.dims else None for tensor in signature.outputs}
        dim = first.pop() if len(first) == 1 else None
        if signature.states or not isinstance(dim, Dim) or dim.sum_of:
            return None
        rowed = tuple(tensor.name for tensor in signature.inputs if _has(tensor, dim))
        shared = tuple(tensor.name for tensor in signature.inputs if tensor.name not in rowed)
        return cls(dim.max, rowed, shared) if rowed else None

    def count(self, call: Inputs) -> int:
        """The rows of a call."""
        return len(call[self.rowed[0]])

    def together(self, calls: Sequence[Timed], shapes: Shapes) -> dict[int, float]:
        """Seconds of several calls of these shapes as one, by their number, from timed calls."""
        found, rows = dict[int, float](), shapes[self.rowed[0]][0]
        for call in calls:
            count, left = divmod(call.shapes.get(self.rowed[0], (0,))[0], rows)
            wanted = {
                name: (count * rows, *shape[1:]) if name in self.rowed else shape for name, shape in shapes.items()
            }
            if count and not left and call.shapes == wanted:
                found[count] = call.seconds
        return found

    def stackable(self, one: Inputs, other: Inputs) -> bool:
        """Whether two calls differ in their rows only."""
        alike = all(one[name].shape[1:] == other[name].shape[1:] for name in self.rowed)
        return alike and all(one[name] is other[name] or np.array_equal(one[name], other[name]) for name in self.shared)

    def stack(self, calls: Sequence[Inputs]) -> dict[str, Array]:
        """The inputs of stackable calls as those of one, the rows of each behind those of the one before."""
        rowed = {name: np.concatenate([call[name] for call in calls]) for name in self.rowed}
        return rowed | {name: calls[0][name] for name in self.shared}

    def unstack(self, outputs: Inputs, calls: Sequence[Inputs]) -> list[dict[str, Array]]:
        """The outputs of each of the stacked calls."""
        return divided(outputs, [self.count(call) for call in calls])


def best(times: Mapping[int, float]) -> int:
    """How many calls are best made as one, of seconds by their number: 1 where joining does not pay."""
    if 1 not in times:
        return 1
    least = min(seconds / count for count, seconds in times.items())
    if least >= GAIN * times[1]:
        return 1
    return min(count for count, seconds in times.items() if seconds / count <= NEARLY * least)


def _has(tensor: Tensor, dim: Dim) -> bool:
    return bool(tensor.dims) and isinstance(tensor.dims[0], Dim) and tensor.dims[0].name == dim.name
