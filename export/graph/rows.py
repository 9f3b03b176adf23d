"""Merged rows get their axes back: [batch * sequence, width] becomes [batch, sequence, width].

Some models merge batch and sequence around layers that compute each row alone, as OPT does around its feed-forward
layers. Their products are traced as Gemm then, as those of one row a sample are, and the division of the rows
afterwards as a chain of Shape, Gather and Concat. With all axes they are MatMul and Add like every other linear layer,
which is what recipes and engines expect where there are many rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir

ELEMENTWISE: Final = frozenset(
    {
        "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu",
        "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt",
        "Sub", "Tanh", "Where",
    }
)  # fmt: skip
"""Operators that compute each element alone."""
NORMS: Final = frozenset({"LayerNormalization", "RMSNormalization"})


def keep_axes(model: ir.Model) -> None:
    """Let what computes rows alone read them with all their axes, between a Reshape that merges axes and the one that
    divides them again. For anything else that reads such rows they are merged there.
    """
    whole: dict[ir.Value | None, ir.Value] = {}  # by merged rows, the same with all axes
    for node in model.graph:  # what is inserted after a node comes next
        if node.op_type == "Reshape":
            _reshape(node, whole)
        elif node.op_type == "Gemm" and node.inputs[0] in whole and _is_linear(node):
            _as_matmul(model, node)
        elif _by_rows(node, whole):
            _widen(model, node, whole)


def _reshape(node: ir.Node, whole: dict[ir.Value | None, ir.Value]) -> None:
    """Note the rows that a Reshape merges; leave out one that divides them as they were before."""
    source, output = node.inputs[0], node.outputs[0]
    if source in whole:
        if _dims(output) == _dims(whole[source]) and not output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, whole[source])
    elif source is not None and _merges(_dims(source), _dims(output)):
        whole[output] = source


def _merges(before: list[int | str], after: list[int | str]) -> bool:
    """Whether several axes become one, and the last stays."""
    several = sum(dim != 1 for dim in before[:-1]) > 1
    return several and len(after) == 2 and isinstance(after[-1], int) and before[-1] == after[-1]


def _is_linear(gemm: ir.Node) -> bool:
    """Whether a Gemm is x @ weight, or with a vector added."""
    scales = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    turned = gemm.attributes.get_int("transA", 0)
    return scales == [1.0, 1.0] and not turned and all(len(_dims(bias)) == 1 for bias in gemm.inputs[2:])


def _as_matmul(model: ir.Model, gemm: ir.Node) -> None:
    """Write a Gemm as Transpose, MatMul and Add, as linear layers of more axes are traced."""
    (x, weight, *bias), output = gemm.inputs, gemm.outputs[0]
    nodes = list[ir.Node]()

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes))
        nodes[-1].metadata_props.update(gemm.metadata_props)  # the module that it comes from
        made = nodes[-1].outputs[0]
        made.name, made.type = f"{output.name}.{op.lower()}", output.type
        return made

    if gemm.attributes.get_int("transB", 0):
        weight = add("Transpose", weight, perm=[1, 0])
    made = add("MatMul", x, weight)
    made.shape = output.shape
    if bias:
        made = add("Add", made, *bias)
        made.shape = output.shape
    made.name = output.name
    model.graph.insert_after(gemm, nodes)
    ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    model.graph.remove(gemm, safe=True)


def _by_rows(node: ir.Node, whole: Mapping[ir.Value | None, ir.Value]) -> bool:
    """Whether a node makes rows from merged rows, each from its own."""
    axes = {tuple(_dims(whole[value])[:-1]) for value in node.inputs if value in whole}
    if len(axes) != 1 or _width(node) is None or node.outputs[0].is_graph_output():
        return False
    first, *others = node.inputs
    if node.op_type in ELEMENTWISE:
        return all(value in whole or _is_vector(value) for value in node.inputs)
    if node.op_type in NORMS:
        return node.attributes.get_int("axis", -1) in (-1, 1) and all(map(_is_vector, others))
    return node.op_type == "MatMul" and first in whole and others[0] not in whole


def _width(node: ir.Node) -> int | None:
    """The length of the rows that a node makes, if it makes rows. What is within functions of the tracer, such as the
    sigmoid of a SiLU, has no shape: element by element, it is as long as the longest operand.
    """
    dims = _dims(node.outputs[0])
    if not dims and node.op_type in ELEMENTWISE:
        lengths = [_dims(value)[-1:] for value in node.inputs]
        return max((length for (length,) in filter(None, lengths) if isinstance(length, int)), default=None)
    return dims[-1] if len(dims) == 2 and isinstance(dims[-1], int) else None


def _widen(model: ir.Model, node: ir.Node, whole: Mapping[ir.Value | None, ir.Value]) -> None:
    """Let a node compute rows with all their axes, and merge them for whoever reads what it gives."""
    axes, rows = next((_dims(whole[value])[:-1], _dims(value)[0]) for value in node.inputs if value in whole)
    output, width = node.outputs[0], _width(node)
    for index, value in enumerate(node.inputs):
        node.replace_input_with(index, whole.get(value, value))
    if node.op_type in NORMS:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
    form = ir.tensor(np.array([-1, width], np.int64), name=f"{output.name}.merged.rows")
    shape = ir.Value(name=form.name, type=ir.TensorType(form.dtype), shape=ir.Shape([2]), const_value=form)
    model.graph.register_initializer(shape)
    merge = ir.node("Reshape", [output, shape])
    merge.metadata_props.update(node.metadata_props)
    merged = merge.outputs[0]
    merged.name, merged.type, merged.shape = f"{output.name}.merged", output.type, ir.Shape([rows, width])
    output.shape = ir.Shape([*axes, width])
    ir.convenience.replace_all_uses_with(output, merged)
    merge.replace_input_with(0, output)
    model.graph.insert_after(node, merge)


def _is_vector(value: ir.Value | None) -> bool:
    """Whether a value has one axis at most, or is an operand that is left out."""
    return value is None or (value.shape is not None and value.shape.is_static() and len(value.shape) < 2)


def _dims(value: ir.Value | None) -> list[int | str]:
    """The lengths of a value's axes, by number or name; none where one is not known."""
    dims = [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in (value and value.shape) or ()]
    return [dim for dim in dims if dim is not None] if None not in dims else []
