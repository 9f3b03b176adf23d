"""From a float graph to one quantized graph for every target: QuantizeLinear and DequantizeLinear of the standard,
nothing else.

Weights are read from the memory-mapped checkpoint a few columns at a time and only when the graph is written, so memory
does not grow with the model. Forms, chosen because ONNX Runtime fuses them (MatMulNBits) and OpenVINO keeps them
compressed (FullyConnected):

    int4 weight [K, N]    codes [K, N], float16 scales [K / block, N] -> Cast -> DequantizeLinear(axis=0, block_size)
                          -> MatMul
    int4 nested in int8   codes, uint8 factors, float32 scales: see runtime/targets/lowering/nested.py; layers with
                          int8 inputs, and convolutions
    int8 weight [K, N]    codes [K, N], float32 scales [N] -> DequantizeLinear(axis=1) -> MatMul, Gemm
    int8 weight [O, ...]  codes [O, ...], float32 scales [O] -> DequantizeLinear(axis=0) -> Conv
    int8 activation       QuantizeLinear -> DequantizeLinear with one scale, zero point 0, shared by all consumers
    fp8 of either         as int8, with codes of E4M3 (FLOAT8E4M3FN) and scales that put the peak at 448

Everything is symmetric: TensorRT accepts no other zero point. Nothing here depends on a model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from calibration.observe.ranges import Range
from calibration.quantize.float8 import FP8_PEAK, Float8Weight
from calibration.quantize.weights import INT8_PEAK, Floats, Known, NestedWeight, QuantizedWeight
from runtime.errors import InvalidInput, did_you_mean
from runtime.targets.lowering import nested
from runtime.targets.lowering.half import Half

WeightType = Literal["float", "int8", "int4", "fp8"]

SMALL: Final = 4096
"""Weights of fewer elements stay as they are, as there is nothing to save."""
SMALL_SHARE: Final = 256
"""But only while they are less than one part in so many of all weights: of a tiny model they are what there is to save.
"""
SMALL_SHARE_INT4: Final = 16
"""The same for weights that are int8 where int4 would save little (`Recipe.worth`)."""
SMALLEST_BLOCK: Final = 32
BLOCKS: Final = (128, 64, SMALLEST_BLOCK)
SMALLEST_NESTED: Final = 24
"""Inputs that share a factor of a weight nested in int8, at least: a factor is half as large as a scale."""
FEW: Final = "too few elements"
LEAST_SNR: Final = 32.0
"""Activations whose own quantization noise is nearer than this to the signal, in dB, stay float.

Measured on the sample UNet: its noisiest fifth, shortcuts of the residual stream among them, costs the final latents 8
of 34 dB.
"""
LEAST_IN_SUM: Final = 40.0
"""But for layers whose noise is this far, in dB, below the sum that their output is added to.

Of Stable Diffusion 1.5's UNet, six products behind GEGLU have 29 to 31 dB by themselves, and each leaves 52 to 72 dB of
the output. 32 dB would not do here, too: the norm behind a sum takes away what is constant in it. On the sample UNet
that cost 6 dB.
"""
LEAST_INT4: Final = 30.0
"""int4 weights that leave their layer's output less than this, in dB, are int8 instead, the worst first."""
MOST_SPARED: Final = 0.03
"""As many as hold this share of all elements that would be int4: what they cost in size and time. See decision 8."""


@dataclass(frozen=True)
class Recipe:
    """How a submodel is quantized. `bits` and `block` are those of MatMul and, with `activations`, of convolutions;
    Gemm's is int8.

    `block` is the number of consecutive inputs that share an int4 scale; a weight of fewer than `worth` elements is
    int8 instead, and, with `spare_last`, that of the layer which makes a submodel's output. `activations` quantizes the
    inputs of these layers to int8 too, which needs their ranges; `naive` does so for every layer, on the largest
    magnitude seen: what the methods of calibration are measured against. `fp8` makes both E4M3 where both are
    quantized. `half` quantizes nothing: all weights are stored in it (`calibration.observe.precision`), and targets
    that can compute in it.
    """

    name: str
    bits: Literal[4, 8, 16]
    block: int = 64
    worth: int = 1 << 15
    spare_last: bool = False
    activations: bool = False
    naive: bool = False
    fp8: bool = False
    half: Half | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that the values of its weights depend on, besides those which make graphs."""
        return ("numpy", "scipy") if self.bits < 16 else ("numpy",)

    @property
    def precisions(self) -> frozenset[str]:
        """What a target must have kernels for: none for half, which all read and compute in float32 where they must."""
        return frozenset({4: {"int4", "int8"}, 8: {"int8", "fp8"} if self.fp8 else {"int8"}, 16: set()}[self.bits])


RECIPES: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", 8, activations=True),
        Recipe("int8-naive", 8, activations=True, naive=True),
        Recipe("int8-weight", 8),
        Recipe("int4", 4, spare_last=True, activations=True),
        Recipe("fp8", 8, activations=True, fp8=True),
        Recipe("fp16", 16, half="float16"),
        Recipe("bf16", 16, half="bfloat16"),
    )
}

INT4_EVERYWHERE: Final = replace(RECIPES["int4"], worth=0, spare_last=False, activations=False)
"""int4 for every weight of a MatMul that can have it: what a search chooses from."""


def recipe(name: str, activations: bool = True, least_bits: int = 4) -> Recipe:
    """The recipe of that name; without `activations`, its weight-only form; that of int8 where it would go below
    `least_bits`.

    Raises InvalidInput with the nearest name.
    """
    if name not in RECIPES:
        raise InvalidInput("quant", f"'{name}' is not a recipe: {did_you_mean(name, RECIPES)}")
    found = RECIPES[name] if RECIPES[name].bits >= least_bits else RECIPES["int8"]
    if activations or not found.activations:
        return found
    return replace(found, activations=False) if found.bits == 4 else RECIPES["int8-weight"]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer. `block` is 0 for one scale a channel.

    `reason` says why anything is not as the recipe asks: the kind of reason, and after a colon what holds for this
    layer alone.
    """

    node: str
    op: str
    weight: str
    elements: int
    weight_type: WeightType
    block: int
    activation: bool
    reason: str = ""

    @property
    def nested(self) -> bool:
        """Whether its int4 weight is nested in int8: no target multiplies it otherwise."""
        return self.weight_type == "int4" and (self.activation or self.op == "Conv")


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
    def matrix(self) -> tuple[int, int]:
        """Rows and columns [K, N] of the weight seen as a matrix: inputs by output channels."""
        rows, *columns = reversed(self.stored) if self.transposed else self.stored
        return (prod(self.stored[1:]), self.stored[0]) if self.node.op_type == "Conv" else (rows, prod(columns))


def plan(
    model: ir.Model,
    recipe: Recipe,
    ranges: Mapping[str, Range] | None = None,
    dilution: Mapping[str, float] | None = None,
) -> list[LayerPlan]:
    """What the recipe makes of each layer that has a weight, in graph order: what `quantize` takes, as it is or
    changed.

    `dilution` says how far, in dB, the output of some layers, by node, is below the sum that it is added to: see
    `sums`.
    """
    layers = list(weight_layers(model))
    small = Small.of(layers, recipe)
    return [_plan_layer(layer, recipe, small, ranges or {}, dilution or {}) for layer in layers]


class Small(NamedTuple):
    """Elements below which a weight stays float, and below which it stays int8 where the recipe is int4."""

    least: int
    worth: int

    @classmethod
    def of(cls, layers: Sequence[Layer], recipe: Recipe) -> Small:
        total = sum({name_of(layer.weight): prod(layer.matrix) for layer in layers}.values())
        return cls(min(SMALL, total // SMALL_SHARE), min(recipe.worth, total // SMALL_SHARE_INT4))


def spare(layers: Sequence[LayerPlan], snr_db: Mapping[str, float]) -> list[LayerPlan]:
    """The plans with int8 for the few int4 weights that leave least of their layer's output. `snr_db` is what they
    leave, by weight.
    """
    elements = {layer.weight: layer.elements for layer in layers if layer.weight_type == "int4"}
    left = MOST_SPARED * sum(elements.values())
    spared = set()
    for weight in sorted(elements.keys() & snr_db.keys(), key=lambda weight: (snr_db[weight], weight)):
        if snr_db[weight] < LEAST_INT4 and elements[weight] <= left:
            left -= elements[weight]
            spared.add(weight)
    return [
        replace(
            layer,
            weight_type="int8",
            block=0,
            reason=f"sensitive: int4 would leave its output {snr_db[layer.weight]:.1f} dB",
        )
        if layer.weight in spared
        else layer
        for layer in layers
    ]


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


def activation_tensors(model: ir.Model, recipe: Recipe) -> list[str]:
    """The tensors whose ranges `quantize` needs, in graph order without repetition: none for a recipe of
    weights alone.
    """
    if not recipe.activations:
        return []
    layers = list(weight_layers(model))
    least = Small.of(layers, recipe).least
    return list(dict.fromkeys(name_of(layer.node.inputs[0]) for layer in layers if not _kind_obstacle(layer, least)))


def measured_tensors(model: ir.Model, layers: Sequence[LayerPlan]) -> list[str]:
    """The tensors whose channel statistics improve what these plans make: inputs of MatMuls with int4 weights or int8
    activations.
    """
    wanted = {
        planned.node
        for planned in layers
        if planned.op == "MatMul" and (planned.weight_type == "int4" or planned.activation)
    }
    return list(
        dict.fromkeys(name_of(layer.node.inputs[0]) for layer in weight_layers(model) if name_of(layer.node) in wanted)
    )


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
    weights: dict[tuple[str, WeightType, int, bool], ir.Value] = {}
    activations: dict[tuple[str, bool], ir.Value] = {}
    for layer in weight_layers(copy):
        planned = plans[name_of(layer.node)]
        if planned.weight_type != "float":
            key = planned.weight, planned.weight_type, planned.block, planned.nested
            if key not in weights:
                known = (codes or {}).get((planned.weight, planned.block, planned.nested))
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


def _plan_layer(
    layer: Layer, recipe: Recipe, small: Small, ranges: Mapping[str, Range], dilution: Mapping[str, float]
) -> LayerPlan:
    rows, columns = layer.matrix
    planned = LayerPlan(
        name_of(layer.node), layer.node.op_type, name_of(layer.weight), rows * columns, "float", 0, False
    )
    if recipe.half:
        return planned
    if rows * columns < small.least:
        return replace(planned, reason=f"{FEW}: {rows * columns}")
    obstacle = (
        _activation_obstacle(layer, recipe, small, ranges, dilution.get(planned.node, 0.0))
        if recipe.activations
        else ""
    )
    activation = recipe.activations and not obstacle
    if recipe.bits == 8:
        planned = replace(
            planned, weight_type="fp8" if recipe.fp8 and activation else "int8", activation=activation, reason=obstacle
        )
    else:
        block, reason = _int4_block(layer, recipe, small, activation)
        planned = replace(
            planned,
            weight_type="int4" if block else "int8",
            block=block,
            activation=activation,
            reason=reason or obstacle,
        )
    return planned  # int8 weights even where others are fp8: as small, and 3 to 12 dB nearer on the samples


def _int4_block(layer: Layer, recipe: Recipe, small: Small, activation: bool) -> tuple[int, str]:
    """How many inputs share a scale of a layer's int4 weight, 0 where it is int8 instead, and why that is not the
    recipe's.

    Nested in int8, any number may; else those that engines have kernels for.
    """
    rows, columns = layer.matrix
    if layer.node.op_type == "Gemm":
        return 0, "one row a sample, such as a time embedding, has little to save and much to lose"
    if layer.node.op_type == "Conv" and (not recipe.activations or layer.node.attributes.get_int("group", 1) != 1):
        return 0, "convolutions without int8 inputs, or in groups, have no int4 form"
    if rows * columns < small.worth:
        return 0, f"{FEW}: int4 would save only {rows * columns // 2} bytes"
    if recipe.spare_last and _makes_output(layer):
        return 0, "makes the output, and nothing behind it averages its error"
    nested = activation or layer.node.op_type == "Conv"
    sizes = (
        range(recipe.block, SMALLEST_NESTED - 1, -1) if nested else [size for size in BLOCKS if size <= recipe.block]
    )
    block = next((size for size in sizes if rows % size == 0), 0)
    if not block or (nested and rows % 2):
        return 0, f"does not divide into blocks: {rows} inputs are no multiple of {sizes[-1]}" + (
            " or more, or odd" if nested else ""
        )
    if columns % 2:
        return 0, f"does not divide into blocks: {columns} outputs are an odd number"
    return block, "" if block == recipe.block else f"smaller blocks: {rows} inputs are no multiple of {recipe.block}"


def _makes_output(layer: Layer) -> bool:
    """Whether what a layer gives is an output of the graph but for its form and a bias."""
    value = layer.node.outputs[0]
    while not value.is_graph_output() and len(value.uses()) == 1:
        user = next(iter(value.uses())).node
        if user.op_type not in ("Reshape", "Transpose", "Cast") and not (
            user.op_type == "Add" and any(map(is_constant, user.inputs))
        ):
            break
        value = user.outputs[0]
    return value.is_graph_output()


def _activation_obstacle(
    layer: Layer, recipe: Recipe, small: Small, ranges: Mapping[str, Range], dilution: float
) -> str:
    """Why a layer's input stays float, or nothing. Of what was not seen yet it is taken that it need not."""
    if obstacle := _kind_obstacle(layer, small.least):
        return obstacle
    seen = ranges.get(name_of(layer.node.inputs[0]))
    if seen is None or recipe.naive or seen.snr_db >= LEAST_SNR or seen.snr_db + dilution >= LEAST_IN_SUM:
        return ""
    in_sum = f"and what it adds to {seen.snr_db + dilution:.1f}"
    return f"noisy input: int8 would leave it {seen.snr_db:.1f} dB, less than {LEAST_SNR:.0f}, {in_sum}"


def _kind_obstacle(layer: Layer, least: int) -> str:
    """Why a layer's input stays float whatever its range is. Weights of fewer than `least` elements stay float
    themselves.
    """
    if prod(layer.matrix) < least:
        return FEW
    if layer.node.op_type == "Gemm":
        return "one row a sample: reading the weight takes the time, int8 inputs would gain none"
    return ""


def add_activation(model: ir.Model, consumer: ir.Node, seen: Range, fp8: bool = False) -> ir.Value:
    """QuantizeLinear and DequantizeLinear, of int8 or E4M3, on the consumer's first input, before the consumer."""
    source = consumer.inputs[0]
    assert source is not None
    name, code = name_of(source), "fp8" if fp8 else "int8"
    dtype, peak = (ir.DataType.FLOAT8E4M3FN, FP8_PEAK) if fp8 else (ir.DataType.INT8, INT8_PEAK)
    step = max(seen.peak / peak, float(np.finfo(np.float32).tiny))  # a tensor that is always zero still needs a scale
    scale = add_initializer(model, f"{name}.{code}.scale", ir.tensor(np.float32(step)))
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
    (rows, columns), conv = layer.matrix, planned.op == "Conv"
    if planned.nested:
        return _add_nested(model, layer, planned, importance, known)
    name, first = code_name(planned), model.graph[0]
    fp8, source, transposed = planned.weight_type == "fp8", tensor_of(layer.weight), layer.transposed or conv
    weight = (
        Float8Weight(source, transposed)
        if fp8
        else QuantizedWeight(source, transposed, planned.block, importance, known)
    )
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


def _add_nested(
    model: ir.Model, layer: Layer, planned: LayerPlan, importance: Floats | None, known: Known | None
) -> ir.Value:
    """`add_weight` of int4 nested in int8."""
    (rows, columns), conv, name = layer.matrix, planned.op == "Conv", code_name(planned)
    weight = NestedWeight(tensor_of(layer.weight), layer.transposed or conv, planned.block, conv, importance, known)
    blocks = rows // planned.block
    codes = _lazy(model, name, ir.DataType.INT4, (columns, rows) if conv else (rows, columns), weight.codes)
    factors = _lazy(
        model,
        f"{name}{nested.FACTORS}",
        ir.DataType.UINT8,
        (columns, blocks) if conv else (blocks, columns),
        weight.scales,
    )
    scales = _lazy(model, scale_name(name), ir.DataType.FLOAT, (columns,), weight.base)
    single, nodes = ir.DataType.FLOAT, list[ir.Value]()

    def add(op: str, inputs: list[ir.Value], output: str, shape: ir.Shape | None, **attributes: Any) -> ir.Value:
        nodes.append(_node(op, inputs, attributes, f"{name}.{output}", single, shape))
        return nodes[-1]

    wide = add("Cast", [factors], "factors.float", factors.shape, to=single)
    if conv:
        axis = add_initializer(model, f"{name}.axis", ir.tensor(np.array([1], np.int64)))
        scales = add("Unsqueeze", [scales, axis], "scale.column", ir.Shape((columns, 1)))
    full = add("Mul", [wide, scales], "scales", factors.shape)
    restored = add("DequantizeLinear", [codes, full], "weight", codes.shape, axis=int(conv), block_size=planned.block)
    if conv:
        restored.name = f"{name}.matrix"
        shape = add_initializer(model, f"{name}.shape", ir.tensor(np.array(layer.stored, np.int64)))
        restored = add("Reshape", [restored, shape], "weight", ir.Shape(layer.stored))
    _insert(model, model.graph[0], *nodes)
    return restored


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
