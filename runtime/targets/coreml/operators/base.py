"""Shared by the translations of operators: their registry, reading a node, and arithmetic on shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.errors import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir

Operator = Callable[[Any, Any], Any]
"""Takes the translator and an onnx_ir node; returns the node's outputs, in order."""
OPERATORS: Final[dict[str, Operator]] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register the translation of these operators."""

    def add(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute of the node."""
    return node.attributes[name].value if name in node.attributes else default


def refuse(node: ir.Node, what: str) -> EngineError:
    """The error for a variant of an operator that is not translated."""
    return EngineError(f"node '{node.name}' ({node.op_type}) {what}, which is not translated to Core ML")


def given(node: ir.Node, index: int) -> Any:
    """An optional input; None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def like(t: Any, x: Any, number: float) -> Any:
    return t.mb.types.nptype_from_builtin(x.dtype)(number)


def reshaped(t: Any, x: Any, shape: list[Any]) -> Any:
    """Reshape to lengths, each a number or a vector with one element."""
    if all(isinstance(length, int) for length in shape):
        return t.mb.reshape(x=x, shape=shape)
    parts = [np.array([length], np.int32) if isinstance(length, int) else length for length in shape]
    return t.mb.reshape(x=x, shape=t.mb.concat(values=parts, axis=0))


def kept(t: Any, x: Any, axis: int) -> Any:
    """The length of an axis: a number where it is fixed, else a vector with one element."""
    length = x.shape[axis]
    return (
        int(length)
        if isinstance(length, int | np.integer)
        else t.mb.slice_by_index(x=t.mb.shape(x=x), begin=[axis], end=[axis + 1])
    )


def placed(t: Any, node: ir.Node, rest: list[int], axes: Any, computed: Any) -> Any:
    """A vector with a number for every axis, one of which is computed."""
    if len(axes) != 1:
        raise refuse(node, "has computed bounds for several axes")
    axis = int(axes[0]) % len(rest)
    parts = [np.array(rest[:axis], np.int32), computed, np.array(rest[axis + 1 :], np.int32)]
    return t.mb.concat(values=[part for part in parts if not isinstance(part, np.ndarray) or part.size], axis=0)
