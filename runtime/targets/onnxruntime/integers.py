"""Products of 8-bit inputs and 8-bit weights as ONNX Runtime's `MatMulIntegerToFloat`, its only kernel for them with a
float result.

By itself ONNX Runtime computes a convolution in 8 bits only where its result is rounded to 8 bits too, and a MatMul
only where no other node reads its rounded input. For all others it dequantizes inputs and weights at each call and
multiplies in float32. Here each of them becomes

    MatMul, Gemm    QuantizeLinear to uint8 - MatMulIntegerToFloat
    Conv            the same for each row of the kernel, over inputs that are concatenated along that row, then Sum

The codes are those of the graph, shifted by 128, or cover the bundle's activation ranges where there are any
(`runtime.targets.lowering.activation_ranges`). Weights stay in their stored form.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Graphs are onnx_ir's and are changed in
place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from runtime.optional import require
from runtime.targets.lowering.activation_ranges import affine
from runtime.targets.lowering.attention import CONTRIB, Graph
from runtime.targets.lowering.values import maker, operand, optional, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

CHANNELS_LAST: Final = (0, 2, 3, 1)
CHANNELS_FIRST: Final = (0, 3, 1, 2)
END: Final = (1 << 63) - 1
"""The end of a Slice that takes everything."""


class Product(NamedTuple):
    """A product of quantized inputs and quantized weights: the node, both nodes that dequantize, and the bias, if
    any.
    """

    node: ir.Node
    inputs: ir.Node
    weights: ir.Node
    bias: ir.Value | None


def with_integer_products(model: ir.Model, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """Compute every product of 8-bit inputs and weights in integers. Returns the names of their results, which stay."""
    graph, codes = Graph(model), _Codes(ranges)
    found = [product for node in model.graph if (product := _product(node)) is not None]
    names = [str(product.node.outputs[0].name) for product in found]
    for product in found:
        made = _convolution(graph, codes, product) if product.node.op_type == "Conv" else _matmul(graph, codes, product)
        graph.instead(product.node.outputs[0], made)
        graph.drop(product.node)
    if found:
        model.opset_imports[CONTRIB] = 1
        require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)
    return names


def first_behind(model: ir.Model, names: Collection[str], count: int) -> str:
    """The first of these values that depends on `count` of them, itself included; the last one where none does."""
    behind: dict[ir.Value | None, int] = {}
    bits = {name: 1 << place for place, name in enumerate(names)}
    for node in model.graph:
        needed = 0
        for value in node.inputs:
            needed |= behind.get(value, 0)
        for value in node.outputs:
            behind[value] = needed | bits.get(str(value.name), 0)
            if value.name in bits and behind[value].bit_count() >= count:
                return str(value.name)
    return list(names)[-1]


def cut_behind(model: ir.Model, name: str) -> None:
    """Keep only the nodes that the value of that name depends on; it becomes the only output."""
    values = (value for node in model.graph for value in node.outputs)
    model.graph.outputs[:] = [next(value for value in values if value.name == name)]
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)
    needed = {value for node in model.graph for value in node.inputs}
    model.graph.inputs[:] = [value for value in model.graph.inputs if value in needed]


class _Codes:
    """The uint8 codes of quantized values, made once each: in their layout, or with channels last."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.ranges = ranges
        self.made: dict[tuple[str, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def of(self, graph: Graph, restored: ir.Node, channels_last: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, scale and zero point of the values that a DequantizeLinear restores."""
        quantize = maker(operand(restored, 0))
        name = str(quantize.name)
        if (name, channels_last) not in self.made:
            if channels_last:
                codes, scale, zero = self.of(graph, restored, False)
                codes = graph.before(quantize, f"{name}.last", "Transpose", codes, perm=list(CHANNELS_LAST))
            else:
                scale, offset = operand(quantize, 1), 128
                if name in self.ranges:
                    form = affine(*self.ranges[name])
                    scale, offset = graph.constant(f"{name}.step", form.step, np.float32), int(form.zero)
                zero = graph.constant(f"integers.zero.{offset}", offset, np.uint8)
                codes = graph.before(
                    quantize, f"{name}.uint8", "QuantizeLinear", quantize.inputs[0], scale, zero, like=zero
                )
            self.made[name, channels_last] = codes, scale, zero
        return self.made[name, channels_last]


def _product(node: ir.Node) -> Product | None:
    """The node as a product of 8-bit inputs and weights; None where it is none, or one that has no such form."""
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    inputs, weights = (value.producer() if value is not None else None for value in node.inputs[:2])
    conv = node.op_type == "Conv"
    if not _restores(inputs, None) or not _restores(weights, 0 if conv else 1):
        return None
    assert inputs is not None and weights is not None, "they restore"
    quantize, codes = operand(inputs, 0).producer(), operand(weights, 0)
    known = codes.const_value is not None and codes.shape is not None and len(codes.shape) == (4 if conv else 2)
    if quantize is None or quantize.op_type != "QuantizeLinear" or not known or not _plain(node):
        return None
    return Product(node, inputs, weights, optional(node, 2))


def _restores(node: ir.Node | None, axis: int | None) -> bool:
    """Whether a node dequantizes int8 codes with one scale, or with one for each index of an axis, and no zero point
    but 0.
    """
    if (
        node is None
        or node.op_type != "DequantizeLinear"
        or operand(node, 0).dtype != require("onnx_ir", "export").DataType.INT8
    ):
        return False
    scale, zero = operand(node, 1), optional(node, 2)
    if scale.shape is None or len(scale.shape) != (0 if axis is None else 1) or _attribute(node, "block_size", 0):
        return False
    if axis is not None and _attribute(node, "axis", 1) != axis:
        return False
    return zero is None or (zero.const_value is not None and not np.asarray(zero.const_value.numpy()).any())


def _plain(node: ir.Node) -> bool:
    """Whether the node is a plain product, or a convolution without groups and dilation."""
    if node.op_type == "Conv":
        gaps = set(_attribute(node, "dilations", (1, 1)))
        return _attribute(node, "group", 1) == 1 and gaps == {1} and _attribute(node, "auto_pad", "NOTSET") == "NOTSET"
    return all(
        _attribute(node, name, plain) == plain
        for name, plain in (("transA", 0), ("transB", 0), ("alpha", 1.0), ("beta", 1.0))
    )


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _matmul(graph: Graph, codes: _Codes, product: Product) -> ir.Value:
    left, scale, zero = codes.of(graph, product.inputs, False)
    weights, scales = operand(product.weights, 0), operand(product.weights, 1)
    return _multiply(graph, product, product.node.name, left, weights, scale, scales, zero, bias=product.bias)


def _multiply(graph: Graph, product: Product, name: str | None, *inputs: ir.Value, bias: ir.Value | None) -> ir.Value:
    added = [] if bias is None else [None, bias]
    return graph.before(
        product.node, name, "MatMulIntegerToFloat", *inputs, *added, like=product.node.outputs[0], domain=CONTRIB
    )


def _convolution(graph: Graph, codes: _Codes, product: Product) -> ir.Value:
    node, name = product.node, product.node.name
    values, scale, zero = codes.of(graph, product.inputs, True)
    weights, scales = operand(product.weights, 0), operand(product.weights, 1)
    outputs, channels, height, width = shape_of(weights).numpy()
    top, left, bottom, right = _attribute(node, "pads", (0, 0, 0, 0))
    strides = _attribute(node, "strides", (1, 1))
    if top or left or bottom or right:
        edges = graph.constant(f"integers.pads.{top}.{left}.{bottom}.{right}", [0, top, left, 0, 0, bottom, right, 0])
        values = graph.before(node, name, "Pad", values, edges, zero)
    columns = [
        _every(graph, node, f"{name}.column{place}", values, 2, place, width, strides[1]) for place in range(width)
    ]
    beside = columns[0] if width == 1 else graph.before(node, f"{name}.columns", "Concat", *columns, axis=3)
    moved = graph.before(node, f"{name}.weights", "Transpose", weights, perm=[2, 3, 1, 0])
    shape = graph.constant(f"integers.rows.{height}.{width * channels}.{outputs}", [height, width * channels, outputs])
    rows = graph.before(node, f"{name}.weights", "Reshape", moved, shape)
    sums = []
    for place in range(height):
        right_rows = graph.before(
            node, f"{name}.weights{place}", "Gather", rows, graph.constant(f"integers.{place}", place), axis=0
        )
        row = _every(graph, node, f"{name}.row{place}", beside, 1, place, height, strides[0])
        bias = product.bias if place == 0 else None
        sums.append(_multiply(graph, product, f"{name}.row{place}", row, right_rows, scale, scales, zero, bias=bias))
    total = sums[0] if height == 1 else graph.before(node, name, "Sum", *sums)
    return graph.before(node, name, "Transpose", total, perm=list(CHANNELS_FIRST))


def _every(
    graph: Graph, node: ir.Node, name: str, value: ir.Value, axis: int, place: int, size: int, stride: int
) -> ir.Value:
    """The elements at `place` of each window of that size, along an axis."""
    if size == 1 and stride == 1:
        return value
    end = END if place == size - 1 else place - size + 1
    ends = (graph.constant(f"integers.{key}", [number]) for key, number in ((f"at{place}", place), (f"end{end}", end)))
    also = (graph.constant(f"integers.axis{axis}", [axis]), graph.constant(f"integers.stride{stride}", [stride]))
    return graph.before(node, name, "Slice", value, *ends, *also)
