"""Reading onnx_ir graphs whose values have types and shapes, as canonical graphs do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def operand(node: ir.Node, index: int) -> ir.Value:
    """The input of a node at that place, which its operator requires."""
    value = node.inputs[index]
    assert value is not None, f"node '{node.name}' lacks its input {index}"
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """The input of a node at that place; None where it has none."""
    return node.inputs[index] if index < len(node.inputs) else None


def shape_of(value: ir.Value) -> ir.Shape:
    assert value.shape is not None, f"value '{value.name}' has no shape"
    return value.shape


def dtype_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, f"value '{value.name}' has no type"
    return value.dtype


def name_of(value: ir.Value) -> str:
    assert value.name is not None, "values of a graph have names"
    return value.name


def maker(value: ir.Value) -> ir.Node:
    """The node that computes a value."""
    node = value.producer()
    assert node is not None, f"value '{value.name}' is computed by a node"
    return node


def uncast(value: ir.Value) -> ir.Value:
    """The input of the graph that a cache is read from: graphs that were lowered to half have a Cast behind it."""
    return value if value.producer() is None else operand(maker(value), 0)
