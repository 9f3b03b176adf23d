"""Products and convolutions. Their weights stay in their stored form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.targets.coreml.operators.base import attribute, given, operator, refuse

if TYPE_CHECKING:
    import onnx_ir as ir


@operator("MatMul")
def _matmul(t: Any, node: ir.Node) -> Any:
    x, weight = t.var(node.inputs[0]), t.constant(node.inputs[1])
    if weight is None or len(weight.shape) != 2 or x.rank > 3:
        return t.mb.matmul(x=x, y=t.weight(node.inputs[1]))
    bias = _following_bias(t, node, weight.shape[1])
    return _linear(t, x, t.weight(node.inputs[1], (1, 0)), bias)


@operator("Gemm")
def _gemm(t: Any, node: ir.Node) -> Any:
    if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
        raise refuse(node, "scales or transposes")
    x, bias = t.var(node.inputs[0]), given(node, 2)
    if t.constant(node.inputs[1]) is None or (bias is not None and t.constant(bias) is None):
        raise refuse(node, "multiplies by what is computed")
    order = () if attribute(node, "transB", 0) else (1, 0)
    return _linear(t, x, t.weight(node.inputs[1], order), None if bias is None else t.var(bias))


def _linear(t: Any, x: Any, weight: Any, bias: Any) -> Any:
    return t.mb.linear(x=x, weight=weight) if bias is None else t.mb.linear(x=x, weight=weight, bias=bias)


def _following_bias(t: Any, node: ir.Node, length: int) -> Any:
    """The bias that the only reader of a product adds, which becomes part of the product."""
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output() or uses[0][0].op_type != "Add":
        return None
    add = uses[0][0]
    other = add.inputs[1 - uses[0][1]]
    constant = t.constant(other)
    if constant is None or constant.shape != (length,):
        return None
    t.follow(product, add.outputs[0])
    return t.var(other)


@operator("Conv")
def _conv(t: Any, node: ir.Node) -> Any:
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        raise refuse(node, "pads by itself")
    bias = given(node, 2)
    weight = t.weight(node.inputs[1])
    spatial = weight.rank - 2
    pads = list(attribute(node, "pads", [0] * 2 * spatial))
    settings = {
        "strides": list(attribute(node, "strides", [1] * spatial)),
        "dilations": list(attribute(node, "dilations", [1] * spatial)),
        "groups": attribute(node, "group", 1),
        "pad_type": "custom",
        "pad": [length for axis in range(spatial) for length in (pads[axis], pads[axis + spatial])],
    }
    if bias is not None:
        settings["bias"] = t.var(bias)
    return t.mb.conv(x=t.var(node.inputs[0]), weight=weight, **settings)
