"""Products whose result is split at once, as gate and value of a GEGLU are, become one product for each part.

The rows of a weight are byte ranges of its file, so this costs nothing, and it lets engines fuse what follows into each
product: OpenVINO copies the parts of a split one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import onnx_ir as ir


class _Product(NamedTuple):
    """x @ weight^T [+ bias]: the nodes from the split's input upwards, the initializers, and the type that the graph
    computes in.
    """

    nodes: Sequence[ir.Node]
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def divide_products(model: ir.Model) -> None:
    """Divide every product of a stored [outputs, inputs] weight that nothing but a split along its outputs reads."""
    for node in list(model.graph):
        if node.op_type != "Split" or node.domain:
            continue
        lengths = [_last(output) for output in node.outputs]
        product = _product(node.inputs[0])
        if (
            product is None
            or None in lengths
            or node.attributes.get_int("axis", 0) not in (-1, _rank(node.outputs[0]) - 1)
        ):
            continue
        start = 0
        for number, (output, length) in enumerate(zip(list(node.outputs), lengths, strict=True)):
            assert length is not None
            made = _part(model, node, product, number, start, length, output)
            ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
            start += length
        model.graph.remove([node, *product.nodes], safe=True)
        _forget(model, [product.weight, *([product.bias] if product.bias else [])])


def _product(value: ir.Value | None) -> _Product | None:
    """The product that makes a value, if only one node reads it and each of its steps."""
    nodes, bias = [], None
    node = _own(value)
    if node is not None and node.op_type == "Add":
        factor = next((one for one in node.inputs if _made_by(one, "MatMul")), None)
        bias = _initializer(next((one for one in node.inputs if one is not factor), None))
        if bias is None or len(bias.shape or ()) != 1:
            return None
        nodes, node = [node], _own(factor)
    if node is None or node.op_type != "MatMul":
        return None
    x, transposed = node.inputs
    turn = transposed.producer() if transposed is not None else None
    weight = _initializer(turn.inputs[0]) if turn is not None and turn.op_type == "Transpose" else None
    if (
        x is None
        or weight is None
        or not isinstance(weight.const_value, ir.ExternalTensor)
        or len(weight.shape or ()) != 2
    ):
        return None
    return _Product([*nodes, node], x, weight, bias)


def _part(
    model: ir.Model, split: ir.Node, product: _Product, number: int, start: int, length: int, output: ir.Value
) -> ir.Value:
    """The product of `length` rows of the weight from `start` on, which takes the place of one output of the split."""

    def add(
        op: str, inputs: Sequence[ir.Value], like: ir.Value, shape: Sequence[Any] | None, **attributes: Any
    ) -> ir.Value:
        node = ir.node(
            op,
            inputs,
            attributes,
            name=f"{split.name}/{number}/{op}{'/bias' if shape is not None and len(shape) == 1 else ''}",
        )
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{node.name}:0", like.type, None if shape is None else ir.Shape(shape)
        model.graph.insert_before(split, node)
        return made

    def rows(whole: ir.Value) -> ir.Value:
        tensor = whole.const_value
        assert isinstance(tensor, ir.ExternalTensor) and whole.shape is not None
        shape = (length, *whole.shape.numpy()[1:])
        size = tensor.nbytes // whole.shape.numpy()[0]
        name = f"{whole.name}.{number}"
        part = ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + start * size,
            length * size,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
        value = ir.Value(name=name, type=whole.type, shape=ir.Shape(shape), const_value=part)
        model.graph.register_initializer(value)
        return value if whole.dtype == output.dtype else add("Cast", [value], output, shape, to=output.dtype)

    weight = rows(product.weight)
    inputs = int(weight.shape[1])  # type: ignore[index,arg-type]
    made = add(
        "MatMul",
        [product.x, add("Transpose", [weight], output, [inputs, length], perm=[1, 0])],
        output,
        list(output.shape or ()),
    )
    return add("Add", [made, rows(product.bias)], output, list(output.shape or ())) if product.bias else made


def _own(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that one node reads and nothing else."""
    return value.producer() if value is not None and len(value.uses()) == 1 and not value.is_graph_output() else None


def _made_by(value: ir.Value | None, op: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op


def _initializer(value: ir.Value | None) -> ir.Value | None:
    """The external initializer that a value is, seen through Cast."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and isinstance(value.const_value, ir.ExternalTensor) else None


def _forget(model: ir.Model, initializers: Sequence[ir.Value]) -> None:
    """Remove what nothing reads any more: initializers and the casts and transposes of them."""
    for value in initializers:
        chain = [value]
        while len(users := chain[-1].consumers()) == 1 and users[0].op_type in ("Cast", "Transpose"):
            chain.append(users[0].outputs[0])
        if chain[-1].uses() or chain[-1].is_graph_output():
            continue
        model.graph.remove([node for one in reversed(chain) if (node := one.producer()) is not None], safe=True)
        del model.graph.initializers[str(value.name)]


def _last(value: ir.Value) -> int | None:
    """The length of the last axis, where it is fixed."""
    length = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return length if isinstance(length, int) else None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1
