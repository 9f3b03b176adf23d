"""Calls of a submodel without states as one call with more rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import divided

Inputs = Mapping[str, Array]


def rows_of(signature: Signature) -> Dim | None:
    """The dim that counts the rows of a call: the first one of every output. None where there is no such dim."""
    first = {tensor.dims[0] if tensor.dims else None for tensor in signature.outputs}
    dim = first.pop() if len(first) == 1 else None
    if signature.states or not isinstance(dim, Dim) or dim.sum_of:
        return None
    return dim if any(_has(tensor, dim) for tensor in signature.inputs) else None


def stackable(signature: Signature, one: Inputs, other: Inputs) -> bool:
    """Whether two calls differ in their rows only. What rows have in common must be equal."""
    dim = rows_of(signature)
    return dim is not None and all(
        one[tensor.name].shape[1:] == other[tensor.name].shape[1:]
        if _has(tensor, dim)
        else one[tensor.name] is other[tensor.name] or np.array_equal(one[tensor.name], other[tensor.name])
        for tensor in signature.inputs
    )


def stack(signature: Signature, calls: Sequence[Inputs]) -> dict[str, Array]:
    """The inputs of stackable calls as those of one, the rows of each behind those of the one before."""
    dim = rows_of(signature)
    assert dim is not None, "stackable calls have rows"
    return {
        tensor.name: np.concatenate([call[tensor.name] for call in calls])
        if _has(tensor, dim)
        else calls[0][tensor.name]
        for tensor in signature.inputs
    }


def unstack(signature: Signature, outputs: Inputs, calls: Sequence[Inputs]) -> list[dict[str, Array]]:
    """The outputs of each of the stacked calls."""
    return divided(outputs, [rows(signature, call) for call in calls])


def rows(signature: Signature, call: Inputs) -> int:
    """The rows of a call."""
    dim = rows_of(signature)
    assert dim is not None, "stackable calls have rows"
    return len(next(call[tensor.name] for tensor in signature.inputs if _has(tensor, dim)))


def _has(tensor: Tensor, dim: Dim) -> bool:
    return bool(tensor.dims) and isinstance(tensor.dims[0], Dim) and tensor.dims[0].name == dim.name
