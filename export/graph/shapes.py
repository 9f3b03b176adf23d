"""Shapes of what some operators compute, given at once; torch finds each by some twenty operations that the graph does
not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload

aten = torch.ops.aten


@contextmanager
def given_shapes() -> Iterator[None]:
    """Within this block torch's Python dispatcher, which exporters use, takes the shapes below."""
    with ExitStack() as stack:
        for operator, shape in SHAPES.items():
            stack.callback(operator._dispatch_cache.clear)
            stack.enter_context(patch.dict(operator.py_kernels, {DispatchKey.CompositeImplicitAutograd: shape}))
            operator._dispatch_cache.clear()
        yield


def _as_input(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x is [..., inputs], weight [outputs, inputs]."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """query is [..., heads, queries, width], value [..., heads, keys, width]; one query may stand for several."""
    pairs = zip(query.shape[:-2], key.shape[:-2], strict=True)
    batch = [theirs if isinstance(own, int) and own == 1 else own for own, theirs in pairs]
    return query.new_empty(*batch, query.shape[-2], value.shape[-1])


SHAPES: Final[dict[OpOverload, Callable[..., torch.Tensor]]] = {
    aten.group_norm.default: _as_input,
    aten.layer_norm.default: _as_input,
    aten.linear.default: _multiplied,
    aten.scaled_dot_product_attention.default: _attended,
}
