"""What becomes of each layer: decided here, once, for all that quantize, measure or compensate it.

Nothing here depends on a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final, Literal, NamedTuple

import onnx_ir as ir

from calibration.observe.ranges import Range
from calibration.quantize.layers import Layer, is_constant, name_of, weight_layers
from calibration.quantize.recipes import Recipe

WeightType = Literal["float", "int8", "int4", "nf4", "fp8"]
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
    def key(self) -> tuple[str, int, bool]:
        """The weight and the form of its int4 codes: what one is made and stored for, whoever multiplies by it."""
        return self.weight, self.block, self.nested

    @property
    def dynamic(self) -> bool:
        """Whether a target may round the layer's input to 8 bits while it runs: a product with a weight of integers."""
        return self.op == "MatMul" and self.weight_type in ("int8", "int4") and not self.activation

    @property
    def nested(self) -> bool:
        """Whether its int4 weight is nested in int8: no target multiplies it otherwise."""
        return self.weight_type == "int4" and (self.activation or self.op == "Conv")


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
    """The tensors whose channel statistics improve what these plans make: inputs of MatMuls with weights of 4
    bits or int8 activations.
    """
    wanted = {planned.node for planned in layers if planned.op == "MatMul" and (planned.block or planned.activation)}
    return list(
        dict.fromkeys(name_of(layer.node.inputs[0]) for layer in weight_layers(model) if name_of(layer.node) in wanted)
    )


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
            weight_type=recipe.four_bits if block else "int8",
            block=block,
            activation=activation,
            reason=reason or obstacle,
        )
    return planned  # int8 weights even where others are fp8: as small, and 3 to 12 dB nearer on the samples


def _int4_block(layer: Layer, recipe: Recipe, small: Small, activation: bool) -> tuple[int, str]:
    """How many inputs share a scale of a layer's weight of 4 bits, 0 where it is int8 instead, and why that is not the
    recipe's.

    Nested in int8, any number may; else those that engines have kernels for.
    """
    rows, columns = layer.matrix
    if layer.node.op_type == "Gemm":
        return 0, "one row a sample, such as a time embedding, has little to save and much to lose"
    if layer.node.op_type == "Conv" and (not recipe.activations or layer.node.attributes.get_int("group", 1) != 1):
        return 0, "convolutions without int8 inputs, or in groups, have no form in 4 bits"
    if rows * columns < small.worth:
        return 0, f"{FEW}: 4 bits would save only {rows * columns // 2} bytes"
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
