"""The layers of a float graph that have a weight, and small helpers on graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_ir as ir


@dataclass(frozen=True)
class Layer:
    """A MatMul, Gemm or Conv, the initializer it multiplies by, and whether that one is stored as [N, K]."""

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def stored(self) -> tuple[int, ...]:
        assert self.weight.shape is not None
        return tuple(self.weight.shape.numpy())

    @property
    def by_output(self) -> bool:
        """Whether the weight is stored with its output channels first: [N, K], or [O, ...] of a convolution."""
        return self.transposed or self.node.op_type == "Conv"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns [K, N] of the weight seen as a matrix: inputs by output channels."""
        rows, *columns = reversed(self.stored) if self.transposed else self.stored
        return (prod(self.stored[1:]), self.stored[0]) if self.node.op_type == "Conv" else (rows, prod(columns))


def weight_layers(model: ir.Model) -> Iterator[Layer]:
    """The layers of a float graph that have a weight, in graph order."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type in ("MatMul", "Gemm", "Conv"):
            layer = layer_of(node)
            if layer is not None:
                yield layer


def layer_of(node: ir.Node) -> Layer | None:
    """Look through Cast and Transpose for the initializer. None when both operands are activations, as within
    attention.
    """
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    value = node.inputs[1]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Transpose" and list(producer.attributes.get_ints("perm", ())) == [1, 0]:
            transposed = not transposed
        elif producer.op_type != "Cast":
            return None
        value = producer.inputs[0]
    if value is None or not value.is_initializer() or (len(value.shape or ()) != 2 and node.op_type != "Conv"):
        return None
    return Layer(node, value, transposed)


def sums(model: ir.Model) -> dict[str, tuple[str, str]]:
    """For each layer whose output is added to another result of the same shape, by node: the tensor that is added, and
    the sum.
    """
    found = {}
    for layer in weight_layers(model):
        value = layer.node.outputs[0]
        while len(value.uses()) == 1 and not value.is_graph_output():
            user, index = next(iter(value.uses()))
            if user.op_type == "Add" and not is_constant(other := user.inputs[1 - index]):
                if value.shape is not None and other is not None and other.shape == value.shape:
                    found[name_of(layer.node)] = name_of(value), name_of(user.outputs[0])
                break
            if user.op_type not in ("Add", "Reshape", "Transpose") or (user.op_type != "Add" and index):
                break
            value = user.outputs[0]
    return found


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, or one that was cast or reshaped."""
    while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Cast", "Reshape"):
        value = maker.inputs[0]
    return value is not None and value.is_initializer()


def add_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None, f"{value.name} has no values: attach the checkpoint before quantizing"
    return value.const_value


def name_of(named: ir.Value | ir.Node | None) -> str:
    assert named is not None
    assert named.name, "every node and value of a canonical graph has a name"
    return named.name
