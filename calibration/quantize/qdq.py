"""From a float graph to one quantized graph for every target: QuantizeLinear and DequantizeLinear of the standard,
nothing else.

Weights are read from the memory-mapped checkpoint a few columns at a time and only when the graph is written, so memory
does not grow with the model. Forms, chosen because ONNX Runtime fuses them (MatMulNBits) and OpenVINO keeps them
compressed (FullyConnected):

    int4 weight [K, N]    codes [K, N], float16 scales [K / block, N] -> Cast -> DequantizeLinear(axis=0, block_size)
                          -> MatMul
    int4 nested in int8   codes, uint8 factors, float32 scales: see runtime/targets/lowering/nested.py; layers with
                          int8 inputs, and convolutions
    nf4 weight [K, N]     codes, float16 scales, and a table of values: see runtime/targets/lowering/nf4.py
    int8 weight [K, N]    codes [K, N], float32 scales [N] -> DequantizeLinear(axis=1) -> MatMul, Gemm
    int8 weight [O, ...]  codes [O, ...], float32 scales [O] -> DequantizeLinear(axis=0) -> Conv
    int8 activation       QuantizeLinear -> DequantizeLinear with one scale, zero point 0, shared by all consumers
    fp8 of either         as int8, with codes of E4M3 (FLOAT8E4M3FN) and scales that put the peak at 448

Everything is symmetric: TensorRT accepts no other zero point. Nothing here depends on a model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from calibration.observe.ranges import Range
from calibration.quantize.forms import input_step, quantized_weight
from calibration.quantize.layers import Layer, add_initializer, name_of, weight_layers
from calibration.quantize.nf4 import Nf4Weight
from calibration.quantize.plan import LayerPlan
from calibration.quantize.weights import Floats, Known, NestedWeight
from runtime.errors import InvalidInput
from runtime.targets.lowering import nested, nf4


def quantize(
    model: ir.Model,
    layers: Sequence[LayerPlan],
    ranges: Mapping[str, Range] | None = None,
    importance: Mapping[str, Floats] | None = None,
    codes: Mapping[tuple[str, int, bool], Known] | None = None,
) -> ir.Model:
    """A quantized copy of a float32-compute graph: each layer as its plan says, whoever made or changed it. `model`
    stays as it is.

    `importance` is the mean square of each channel, float32 [K], of the tensors that layers read, where known: int4
    scales then minimise the error of the layer's output instead of the weight's. `codes` are int4 weights made before,
    by weight, block and whether they are nested, as those of `calibration.quantize.gptq`: they are taken as they are.
    Weight values are computed when the copy is written. Then SourceError is raised, naming the weight, when it holds
    NaN or infinity or exceeds what its scale can express. Raises InvalidInput at once when `ranges` lacks the input of
    a layer whose plan quantizes it.
    """
    ranges, importance, plans = ranges or {}, importance or {}, {planned.node: planned for planned in layers}
    missing = [
        name
        for layer in weight_layers(model)
        if plans[name_of(layer.node)].activation and (name := name_of(layer.node.inputs[0])) not in ranges
    ]
    if missing:
        raise InvalidInput("ranges", f"lack {len(missing)} activations ({', '.join(missing[:3])}): calibrate first")
    copy = model.clone()
    weights: dict[tuple[str, str, int, bool], ir.Value] = {}
    activations: dict[tuple[str, bool], ir.Value] = {}
    for layer in weight_layers(copy):
        planned = plans[name_of(layer.node)]
        if planned.weight_type != "float":
            key = planned.weight_type, *planned.key
            if key not in weights:
                known = (codes or {}).get(planned.key)
                seen = importance.get(name_of(layer.node.inputs[0])) if planned.op != "Conv" else None
                weights[key] = add_weight(copy, layer, planned, seen, known)
            layer.node.replace_input_with(1, weights[key])
            if layer.node.op_type == "Gemm":
                layer.node.attributes["transB"] = ir.AttrInt64("transB", 0)
        if planned.activation:
            source = layer.node.inputs[0]
            read = name_of(source), planned.weight_type == "fp8"
            if read not in activations:
                activations[read] = add_activation(copy, layer.node, ranges[read[0]], fp8=read[1])
            layer.node.replace_input_with(0, activations[read])
    common.RemoveUnusedNodesPass()(copy)
    return copy


def add_activation(model: ir.Model, consumer: ir.Node, seen: Range, fp8: bool = False) -> ir.Value:
    """QuantizeLinear and DequantizeLinear, of int8 or E4M3, on the consumer's first input, before the consumer."""
    source = consumer.inputs[0]
    assert source is not None
    name, code = name_of(source), "fp8" if fp8 else "int8"
    dtype = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.INT8
    scale = add_initializer(model, f"{name}.{code}.scale", ir.tensor(input_step(seen.peak, fp8)))
    zero = add_initializer(model, f"{name}.{code}.zero_point", ir.tensor(np.zeros((), dtype.numpy())))
    quantized = _node("QuantizeLinear", [source, scale, zero], {}, f"{name}.{code}", dtype, source.shape)
    restored = _node(
        "DequantizeLinear", [quantized, scale, zero], {}, f"{name}.{code}.dequantized", ir.DataType.FLOAT, source.shape
    )
    _insert(model, consumer, quantized, restored)
    return restored


def activation_ranges(
    layers: Sequence[LayerPlan], model: ir.Model, ranges: Mapping[str, Range]
) -> dict[str, tuple[float, float]]:
    """Activation ranges for targets with zero points, by the name of the QuantizeLinear node that `quantize` makes of
    these plans.
    """
    planned = {layer.node for layer in layers if layer.activation and layer.weight_type == "int8"}
    read = dict.fromkeys(
        name_of(layer.node.inputs[0]) for layer in weight_layers(model) if name_of(layer.node) in planned
    )
    found = {name: (ranges[name].low, ranges[name].high) for name in read}
    return {f"{name}/QuantizeLinear": limits for name, limits in found.items() if any(limits)}


def add_weight(
    model: ir.Model, layer: Layer, planned: LayerPlan, importance: Floats | None = None, known: Known | None = None
) -> ir.Value:
    """The layer's weight as quantized initializers and their DequantizeLinear, at the head of the graph."""
    weight = quantized_weight(layer, planned, importance, known)
    if isinstance(weight, NestedWeight):
        return _add_nested(model, layer, planned, weight)
    if isinstance(weight, Nf4Weight):
        return _add_nf4(model, layer, planned, weight)
    (rows, columns), conv = layer.matrix, planned.op == "Conv"
    name, first, fp8 = code_name(planned), model.graph[0], planned.weight_type == "fp8"
    if planned.weight_type == "int4":
        codes = _lazy(model, name, ir.DataType.INT4, (rows, columns), weight.codes)
        stored = _lazy(model, scale_name(name), ir.DataType.FLOAT16, (rows // planned.block, columns), weight.scales)
        scale = _node(
            "Cast", [stored], {"to": ir.DataType.FLOAT}, f"{name}.scale.float", ir.DataType.FLOAT, stored.shape
        )
        attributes, values = {"axis": 0, "block_size": planned.block}, [scale]
    else:
        dtype = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.INT8
        codes = _lazy(
            model, name, dtype, layer.stored if conv else (rows, columns), weight.kernel if conv else weight.codes
        )
        scale = _lazy(model, scale_name(name), ir.DataType.FLOAT, (columns,), weight.scales)
        attributes, values = {"axis": 0 if conv else 1}, []
    restored = _node(
        "DequantizeLinear", [codes, scale], attributes, f"{name}.dequantized", ir.DataType.FLOAT, codes.shape
    )
    _insert(model, first, *values, restored)
    return restored


class _Restoring:
    """The nodes that restore a weight, for the head of the graph. Names begin with that of its codes."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self._model, self._name, self._values = model, name, list[ir.Value]()

    def constant(self, end: str, numbers: Sequence[int]) -> ir.Value:
        """int64 numbers that a node reads."""
        return add_initializer(self._model, f"{self._name}.{end}", ir.tensor(np.array(numbers, np.int64)))

    def add(self, op: str, inputs: list[ir.Value], output: str, shape: Sequence[int], **attributes: Any) -> ir.Value:
        """What a node gives: float32, or what a Cast makes."""
        dtype = attributes.get("to", ir.DataType.FLOAT)
        self._values.append(_node(op, inputs, attributes, f"{self._name}.{output}", dtype, ir.Shape(shape)))
        return self._values[-1]

    def insert(self) -> ir.Value:
        """The last value, the nodes being in the graph."""
        _insert(self._model, self._model.graph[0], *self._values)
        return self._values[-1]


def _add_nested(model: ir.Model, layer: Layer, planned: LayerPlan, weight: NestedWeight) -> ir.Value:
    """`add_weight` of int4 nested in int8."""
    (rows, columns), conv, name = layer.matrix, planned.op == "Conv", code_name(planned)
    blocks = rows // planned.block
    matrix, few = ((columns, rows), (columns, blocks)) if conv else ((rows, columns), (blocks, columns))
    codes = _lazy(model, name, ir.DataType.INT4, matrix, weight.codes)
    factors = _lazy(model, f"{name}{nested.FACTORS}", ir.DataType.UINT8, few, weight.scales)
    scales = _lazy(model, scale_name(name), ir.DataType.FLOAT, (columns,), weight.base)
    nodes = _Restoring(model, name)
    wide = nodes.add("Cast", [factors], "factors.float", few, to=ir.DataType.FLOAT)
    if conv:
        scales = nodes.add("Unsqueeze", [scales, nodes.constant("axis", [1])], "scale.column", (columns, 1))
    full = nodes.add("Mul", [wide, scales], "scales", few)
    form = {"axis": int(conv), "block_size": planned.block}
    restored = nodes.add("DequantizeLinear", [codes, full], "weight", matrix, **form)
    if conv:
        restored.name = f"{name}.matrix"
        nodes.add("Reshape", [restored, nodes.constant("shape", layer.stored)], "weight", layer.stored)
    return nodes.insert()


def _add_nf4(model: ir.Model, layer: Layer, planned: LayerPlan, weight: Nf4Weight) -> ir.Value:
    """`add_weight` of nf4."""
    (rows, columns), name = layer.matrix, code_name(planned)
    blocks = rows // planned.block, planned.block, columns
    codes = _lazy(model, name, ir.DataType.UINT4, (rows, columns), weight.codes)
    scales = _lazy(model, scale_name(name), ir.DataType.FLOAT16, (blocks[0], columns), weight.scales)
    known = model.graph.initializers
    table = known.get(nf4.TABLE) or add_initializer(model, nf4.TABLE, ir.tensor(nf4.VALUES))
    nodes = _Restoring(model, name)
    places = nodes.add("Cast", [codes], "places", (rows, columns), to=ir.DataType.INT32)
    values = nodes.add("Gather", [table, places], "values", (rows, columns))
    values = nodes.add("Reshape", [values, nodes.constant("blocks", blocks)], "blocks.values", blocks)
    wide = nodes.add("Cast", [scales], "scale.float", (blocks[0], columns), to=ir.DataType.FLOAT)
    wide = nodes.add("Unsqueeze", [wide, nodes.constant("axis", [1])], "scale.column", (blocks[0], 1, columns))
    product = nodes.add("Mul", [values, wide], "product", blocks)
    nodes.add("Reshape", [product, nodes.constant("shape", (rows, columns))], nf4.WEIGHT[1:], (rows, columns))
    return nodes.insert()


def code_name(planned: LayerPlan) -> str:
    """The initializer that holds the codes of a layer's weight; empty where it stays float."""
    if planned.weight_type == "float":
        return ""
    return f"{planned.weight}{nested.CODES}" if planned.nested else f"{planned.weight}.{planned.weight_type}"


def scale_name(codes: str) -> str:
    """The initializer that holds the scales of these codes."""
    return f"{codes}.scale"


def _node(
    op: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, Any],
    output: str,
    dtype: ir.DataType,
    shape: ir.Shape | None,
) -> ir.Value:
    node = ir.node(op, inputs, attributes, name=f"{output.rpartition('.')[0]}/{op}")
    value = node.outputs[0]
    value.name, value.dtype, value.shape = output, dtype, shape
    return value


def _insert(model: ir.Model, before: ir.Node, *values: ir.Value) -> None:
    model.graph.insert_before(before, [node for value in values if (node := value.producer()) is not None])


def _lazy(
    model: ir.Model, name: str, dtype: ir.DataType, shape: Iterable[int], compute: Callable[[], ir.TensorProtocol]
) -> ir.Value:
    return add_initializer(model, name, ir.LazyTensor(compute, dtype, ir.Shape(shape), name=name))
