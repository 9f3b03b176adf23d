"""Shapes that are given to the exporter are those of the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._C import DispatchKey
from torch._ops import OpOverload

from export.graph.shapes import SHAPES, given_shapes

aten = torch.ops.aten
X = torch.randn(2, 6, 4, 8)
CALLS: dict[OpOverload, list[tuple[Any, ...]]] = {
    aten.group_norm.default: [(X, 3), (X.transpose(2, 3), 2, torch.ones(6), torch.zeros(6))],
    aten.layer_norm.default: [(X, [8]), (X.transpose(1, 3), [4, 6])],
    aten.linear.default: [(X, torch.ones(5, 8)), (X[0, 0, 0], torch.ones(3, 8), torch.ones(3))],
    aten.scaled_dot_product_attention.default: [
        (X, X, X), (X, torch.ones(2, 6, 7, 8), torch.ones(2, 6, 7, 3), torch.zeros(4, 7)), (X[:1], X, X)
    ],
}  # fmt: skip


@pytest.mark.parametrize("operator", SHAPES, ids=str)
def test_they_are_the_operator_s(operator: OpOverload) -> None:
    for arguments in CALLS[operator]:
        found, wanted = SHAPES[operator](*arguments), operator(*arguments)
        assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
        assert found.is_contiguous()


def test_several_heads_of_queries_share_keys() -> None:
    attention, keys = aten.scaled_dot_product_attention.default, X[:, :3]
    found = SHAPES[attention](X, keys, keys, enable_gqa=True)
    assert found.shape == attention(X, keys, keys, enable_gqa=True).shape


def test_nothing_of_torch_stays_changed() -> None:
    before = {operator: dict(operator.py_kernels) for operator in SHAPES}
    with given_shapes():
        for operator, shape in SHAPES.items():
            assert operator.py_kernels[DispatchKey.CompositeImplicitAutograd] is shape
    assert before == {operator: dict(operator.py_kernels) for operator in SHAPES}
    for operator in SHAPES:
        assert not operator._dispatch_cache, "kernels are looked up again"
