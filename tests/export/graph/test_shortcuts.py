"""Traces take less time with shortcuts, and give the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.fx.experimental.sym_node import SymNode
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._registration import ONNXRegistry

import export.graph.trace
from export.graph.shortcuts import OPERATIONS, registry
from export.graph.trace import trace, without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor

EDGE = Dim(name="edge", min=4, opt=8, max=64, multiple=2)
SIGNATURE = Signature(
    inputs=(Tensor(name="x", dtype="float32", dims=(BATCH, 4, EDGE, EDGE)),),
    outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, 4, EDGE, EDGE)),),
)

SHAPES = {"y": (BATCH, 4, EDGE, EDGE), "turned": (BATCH, EDGE, 4, EDGE), "same": (BATCH, 4, EDGE, EDGE)}
VIEWED = tuple(Tensor(name=name, dtype="float32", dims=dims) for name, dims in (SHAPES | {"soft": SHAPES["y"]}).items())


class Small(nn.Module):
    """Lengths that are halved, doubled, multiplied and compared; integers that become floats."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        small = self.norm(self.down(x))
        rows = small.flatten(2).transpose(1, 2).unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(rows, rows, rows).transpose(2, 3).reshape(small.shape)
        large = nn.functional.interpolate(mixed, size=x.shape[2:], mode="nearest")
        return (x + self.up(large) * torch.arange(x.shape[3], device=x.device) / 2,)


class Changing(nn.Module):
    """A tensor that is changed in place, outputs that are an input and a view of one, and a sum that is computed."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = x * 2
        changed.add_(1)
        return (changed, x.transpose(1, 2), x, torch.softmax(x, 1))


class Viewing(nn.Module):
    """The same without changes."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2, x.transpose(1, 2), x, torch.softmax(x, 1))


def described(model: ir.Model) -> list[tuple[Any, ...]]:
    """The nodes that make the outputs, with values by the order in which they appear: their names depend on what was
    computed, and so does the order of nodes that do not need each other.
    """
    order: dict[ir.Value | None, int] = {}

    def place(value: ir.Value | None) -> object:
        constant = None if value is None or value.const_value is None else value.const_value.numpy().tolist()
        shape = None if value is None else str(value.shape)
        return order.setdefault(value, len(order)), shape, constant

    return [
        (
            node.op_type,
            [(name, str(value.value)) for name, value in node.attributes.items()],
            [place(value) for value in (*node.inputs, *node.outputs)],
        )
        for node in needed(model)
    ]


def needed(model: ir.Model) -> list[ir.Node]:
    """All nodes of a graph, each behind those that it needs, in the order in which the outputs need them."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> None:
        node = value and value.producer()
        if node is not None and node not in found:
            for each in node.inputs:
                visit(each)
            found[node] = None

    for output in model.graph.outputs:
        visit(output)
    assert found.keys() == set(model.graph), "nothing is left over"
    return list(found)


def translations_alone() -> Any:
    """No shortcuts, but for the translations of operators, which are read once: a test of their own is below."""
    return patch.object(ONNXRegistry, "from_torchlib", staticmethod(registry))


def test_the_graph_is_the_same_with_fewer_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most operations on sizes repeat, and nothing of torch stays changed."""
    calls = [0]

    def counted(operation: Callable[[SymNode, Any], SymNode]) -> Callable[[SymNode, Any], SymNode]:
        def count(self: SymNode, other: Any) -> SymNode:
            calls[-1] += 1
            return operation(self, other)

        return count

    for name in OPERATIONS:
        monkeypatch.setattr(SymNode, name, counted(getattr(SymNode, name)))
    own = {name: getattr(SymNode, name) for name in OPERATIONS}
    with without_weights():
        module = Small()
    found = described(trace(module, SIGNATURE))
    assert own == {name: getattr(SymNode, name) for name in OPERATIONS}
    calls.append(0)
    with patch.object(export.graph.trace, "shortcuts", translations_alone):
        wanted = described(trace(module, SIGNATURE))
    assert found == wanted and calls[0] < calls[1] / 2
    assert "Cast" in {node[0] for node in wanted}, "integers become floats"


@pytest.mark.parametrize("kind", [Changing, Viewing])
def test_outputs_that_are_inputs_and_tensors_that_are_changed(kind: type[nn.Module]) -> None:
    signature = Signature(inputs=SIGNATURE.inputs, outputs=VIEWED)
    found = described(trace(kind(), signature))
    with patch.object(export.graph.trace, "shortcuts", translations_alone):
        assert found == described(trace(kind(), signature))


def test_translations_of_operators_are_read_once_in_a_process() -> None:
    trace(Viewing(), Signature(inputs=SIGNATURE.inputs, outputs=VIEWED))
    made = ONNXRegistry.__dict__["from_torchlib"]
    with patch.object(_registration, "_get_overload") as read:
        trace(Viewing(), Signature(inputs=SIGNATURE.inputs, outputs=VIEWED))
    read.assert_not_called()
    assert isinstance(made, classmethod), "nothing of torch stays changed"
