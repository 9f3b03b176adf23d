"""What each layer's quantization does to a submodel's output, measured: one graph of all alternatives, with a switch
for each layer.

The switched graph keeps each layer's float weight and adds a share of the error of one of its forms, which inputs of
the graph choose: no share is float, a whole one the quantized layer, so an assignment of any kind is tried by running
the same session again with other numbers. Weights are rounded when a layer asks for it and forgotten after: only the
scales of quantized weights are held in memory. Noise is the squared difference from the float output as a share of its
power; small noises of different layers add up, which `calibration.search.search` relies on and checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log10
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.ground.progress import each
from calibration.observe.lean import lean_session
from calibration.observe.ranges import Range
from calibration.quantize.forms import input_step, quantized_weight
from calibration.quantize.layers import Layer, add_initializer, name_of, weight_layers
from calibration.quantize.plan import LayerPlan
from calibration.quantize.tuning import Tuning
from calibration.quantize.weights import Floats
from runtime.bundle.signature import Array
from runtime.errors import InvalidInput

SWITCH: Final = "switch"
FLOAT: Final = 0
SAMPLED: Final = 1 << 17
"""Elements of the output, over all calls, that `Board.change` gives at most."""
TOGETHER_BYTES: Final = 4 << 20
"""Calls are run together while the largest output of a layer stays within this: each weight is then made once for all
of them.

Small enough that attention over them, which may be a thousand times larger, fits too.
"""

Choice = NDArray[np.int64]
"""For each layer 0 (float) or 1 + the index of its recipe."""
WeightKind = tuple[str, int]
"""Type and block of a quantized weight."""
Measure = Callable[[], NDArray[np.float64]]
Kept = Callable[[str, Measure], NDArray[np.float64]]
"""Gives the figures of that name, measured unless they are known from before."""


@dataclass(frozen=True)
class Alternative:
    """A form that a layer may take, and the noise on the output when only this layer takes it."""

    plan: LayerPlan
    noise: float


@dataclass(frozen=True)
class Errors:
    """How much of each layer's errors is added: `weights` [layers, kinds] of its weight's, `activations` [layers] of
    its input's, float32.

    1 is what quantization does, 0 none of it, -1 its opposite.
    """

    weights: Floats
    activations: Floats


def measured(name: str, measure: Measure) -> NDArray[np.float64]:
    """A `Kept` that knows nothing."""
    return measure()


def snr_db(noise: float) -> float:
    """Signal to noise ratio of a relative noise power, at most 200."""
    return min(200.0, -10 * log10(noise)) if noise > 0 else 200.0


class Board:
    """A submodel whose layers can be switched between forms. `recipes` are plans of all layers, each of which is one
    form.

    `layers` are their nodes in graph order, `kinds` those that any weight takes, `work` the multiply-accumulates of
    each layer over the first sample.
    """

    def __init__(
        self,
        model: ir.Model,
        recipes: Sequence[Sequence[LayerPlan]],
        tuning: Tuning,
        samples: Sequence[Mapping[str, Array]],
    ) -> None:
        """Raises InvalidInput when there are no samples."""
        if not samples:
            raise InvalidInput(
                "samples",
                "are none, expected captured inputs to measure sensitivity with: calibrate with more requests",
            )
        layers = list(weight_layers(model))
        self.layers = [name_of(layer.node) for layer in layers]
        self.forms = [{planned.node: planned for planned in recipe} for recipe in recipes]
        self.kinds = list(dict.fromkeys(kind_of(p) for recipe in recipes for p in recipe if p.weight_type != "float"))
        sizes = _output_sizes(model, samples[0])
        self.work = [size * layer.matrix[0] for size, layer in zip(sizes, layers, strict=True)]
        self._outputs = [name_of(value) for value in model.graph.outputs][
            :1
        ]  # states follow: the first output is the submodel's own
        self._session: Any = lean_session(_switched(model, self.forms, self.kinds, tuning))
        self._calls = _together(model, samples, TOGETHER_BYTES // (4 * max(sizes, default=1)))
        self._reference = [self._run(self.none(), call) for call in self._calls]
        self._power = sum(float(np.square(array, dtype=np.float64).sum()) for array in self._reference) or 1.0
        generator, size = np.random.default_rng(0), sum(array.size for array in self._reference)
        self._places = [
            np.sort(generator.permutation(array.size)[: -(-SAMPLED * array.size // size)]) for array in self._reference
        ]

    def noise(self, choice: Choice) -> float:
        """Relative noise power of the output under an assignment, over all samples."""
        errors = self.none()
        for index, (node, number) in enumerate(zip(self.layers, choice, strict=True)):
            if number != FLOAT:
                planned = self.forms[number - 1][node]
                errors.weights[index, self.kinds.index(kind_of(planned))] = 1
                errors.activations[index] = planned.activation
        pairs = zip(self._reference, self._calls, strict=True)
        error = sum(
            float(np.sum(np.square(np.subtract(self._run(errors, call), wanted, dtype=np.float64))))
            for wanted, call in pairs
        )
        return error / self._power

    def change(self, errors: Errors) -> NDArray[np.float64]:
        """What these do to the output: the same elements of it each time, from all calls, scaled so that their power is
        the noise.
        """
        pairs = zip(self._reference, self._calls, self._places, strict=True)
        changed = [
            np.subtract(self._run(errors, call).ravel()[at], wanted.ravel()[at], dtype=np.float64)
            for wanted, call, at in pairs
        ]
        share = sum(at.size for at in self._places) / sum(wanted.size for wanted in self._reference)
        return np.concatenate(changed) / np.sqrt(self._power * share)

    def none(self) -> Errors:
        """No errors: the float graph."""
        return Errors(np.zeros((len(self.layers), len(self.kinds)), np.float32), np.zeros(len(self.layers), np.float32))

    def alternatives(self, kept: Kept = measured) -> list[list[Alternative]]:
        """For each layer its forms other than float, without those that are the same, and what each does alone."""
        return [
            [
                Alternative(form, float(kept(f"layer-{index}-{number}", partial(self._alone, index, number))))
                for number, form in forms
            ]
            for index, forms in enumerate(each("layer", self.choices()))
        ]

    def choices(self) -> list[list[tuple[int, LayerPlan]]]:
        """For each layer its forms other than float, without those that are the same, each with its number in a
        `Choice`.
        """
        found = []
        for node in self.layers:
            forms: dict[LayerPlan, int] = {}
            for number, plans in enumerate(self.forms, 1):
                planned = replace(plans[node], reason="")
                if planned.weight_type != "float":
                    forms.setdefault(planned, number)
            found.append([(number, planned) for planned, number in forms.items()])
        return found

    def choice(self, plans: Sequence[LayerPlan]) -> Choice:
        """The assignment that these plans, each one of the forms, stand for."""
        chosen = {planned.node: planned for planned in plans}
        return np.array([self._number(node, chosen[node]) for node in self.layers], np.int64)

    def _number(self, node: str, planned: LayerPlan) -> int:
        if planned.weight_type == "float":
            return FLOAT
        return 1 + next(
            number for number, plans in enumerate(self.forms) if replace(plans[node], reason=planned.reason) == planned
        )

    def _alone(self, index: int, number: int) -> NDArray[np.float64]:
        choice = np.full(len(self.layers), FLOAT, np.int64)
        choice[index] = number
        return np.array(self.noise(choice))

    def _run(self, errors: Errors, call: Mapping[str, Array]) -> Array:
        switches = {f"{SWITCH}.weights": errors.weights.ravel(), f"{SWITCH}.activations": errors.activations}
        (output,) = self._session.run(self._outputs, {**call, **switches})
        return np.asarray(output)


def kind_of(planned: LayerPlan) -> WeightKind:
    """Of a plan that quantizes its weight."""
    return planned.weight_type, planned.block


def _switched(
    model: ir.Model, forms: Sequence[Mapping[str, LayerPlan]], kinds: Sequence[WeightKind], tuning: Tuning
) -> ir.Model:
    """The float graph with each layer's operands behind If nodes. Two inputs control them: `Errors`, float32 [layers *
    kinds], [layers].
    """
    switched = model.clone()
    layers = list(weight_layers(switched))
    sizes = {"weights": len(layers) * len(kinds), "activations": len(layers)}
    inputs = {
        name: ir.Value(name=f"{SWITCH}.{name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([size]))
        for name, size in sizes.items()
    }
    switched.graph.inputs.extend(inputs.values())
    for index, layer in enumerate(layers):
        planned = [plans[name_of(layer.node)] for plans in forms if plans[name_of(layer.node)].weight_type != "float"]
        weight = _as_stored(switched, layer.node)
        for form in {kind_of(form): form for form in planned}.values():
            amount = _amount(switched, layer.node, inputs["weights"], index * len(kinds) + kinds.index(kind_of(form)))
            weight = _with_error(switched, layer.node, weight, amount, _weight_rounding(switched, layer, form, tuning))
        layer.node.replace_input_with(1, weight)
        if any(form.activation for form in planned):
            source = layer.node.inputs[0]
            assert source is not None
            rounding = _activation_rounding(switched, name_of(source), tuning.ranges[name_of(source)])
            amount = _amount(switched, layer.node, inputs["activations"], index)
            layer.node.replace_input_with(0, _with_error(switched, layer.node, source, amount, rounding))
    return switched


Rounding = tuple[list[ir.Value], dict[str, Any], dict[str, Any]]
"""Scale and zero point of a QuantizeLinear, its attributes and those of its DequantizeLinear."""


def _weight_rounding(model: ir.Model, layer: Layer, planned: LayerPlan, tuning: Tuning) -> Rounding:
    """Rounds to the numbers that `calibration.quantize.qdq` stores."""
    name = f"{SWITCH}.{planned.weight}.{planned.weight_type}.{planned.block}"
    scale = model.graph.initializers.get(name)
    if scale is None:
        importance = tuning.importance.get(name_of(layer.node.inputs[0]))
        scales = quantized_weight(layer, planned, importance).scales().numpy()
        scale = add_initializer(model, name, ir.tensor(scales.astype(np.float32), name=name))
    attributes = (
        {"axis": 0, "block_size": planned.block} if planned.block else {"axis": 0 if planned.op == "Conv" else 1}
    )
    dtype = ir.DataType.INT4 if planned.weight_type == "int4" else ir.DataType.INT8
    return [scale], {**attributes, "output_dtype": int(dtype)}, attributes


def _activation_rounding(model: ir.Model, name: str, seen: Range) -> Rounding:
    scale = model.graph.initializers.get(f"{SWITCH}.{name}") or add_initializer(
        model, f"{SWITCH}.{name}", ir.tensor(input_step(seen.peak))
    )
    return [scale], {"output_dtype": int(ir.DataType.INT8)}, {}


def _with_error(model: ir.Model, before: ir.Node, value: ir.Value, amount: ir.Value, rounding: Rounding) -> ir.Value:
    """The value plus an amount of its rounding error, which is computed only where there is an amount."""
    scale, to, back = rounding
    stem = f"{amount.name}.error"

    def node(op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Node:
        made = ir.node(op, inputs, attributes or {}, name=f"{stem}/{op}")
        made.outputs[0].name = f"{stem}.{op}"
        return made

    rounded = node("QuantizeLinear", [value, *scale], to)
    restored = node("DequantizeLinear", [rounded.outputs[0], *scale], back)
    error = node("Sub", [restored.outputs[0], value])
    share = node("Mul", [error.outputs[0], amount])
    changed, same = node("Add", [value, share.outputs[0]]), node("Identity", [value])
    changed.outputs[0].dtype = same.outputs[0].dtype = ir.DataType.FLOAT
    branches = {
        "then_branch": ir.Graph(
            [], changed.outputs, nodes=[rounded, restored, error, share, changed], name=f"{stem}.some"
        ),
        "else_branch": ir.Graph([], same.outputs, nodes=[same], name=f"{stem}.none"),
    }
    chosen = _put(model, before, "Cast", [amount], {"to": int(ir.DataType.BOOL)})
    return _put(model, before, "If", [chosen], {name: ir.AttrGraph(name, graph) for name, graph in branches.items()})


def _amount(model: ir.Model, before: ir.Node, amounts: ir.Value, index: int) -> ir.Value:
    name = f"{SWITCH}.{index}"
    place = model.graph.initializers.get(name) or add_initializer(model, name, ir.tensor(np.array(index, np.int64)))
    value = _put(model, before, "Gather", [amounts, place])
    value.name = f"{amounts.name}.{index}"
    return value


def _output_sizes(model: ir.Model, sample: Mapping[str, Array]) -> list[int]:
    """Elements of each layer's output with this input."""
    counted = model.clone()
    sizes = [ir.node("Size", [layer.node.outputs[0]]) for layer in weight_layers(counted)]
    counted.graph.extend(sizes)
    for index, size in enumerate(sizes):
        value = size.outputs[0]
        value.name, value.dtype, value.shape = f"{SWITCH}.size.{index}", ir.DataType.INT64, ir.Shape([])
    counted.graph.outputs[:] = [size.outputs[0] for size in sizes]
    return [int(size) for size in lean_session(counted).run(None, dict(sample))] if sizes else []


def _together(model: ir.Model, samples: Sequence[Mapping[str, Array]], most: int) -> list[Mapping[str, Array]]:
    """The same calls, up to `most` of equal shapes in one, where the first dimension of every input and output is the
    same one.
    """
    shapes = [value.shape or ir.Shape([1]) for value in [*model.graph.inputs, *model.graph.outputs]]
    firsts = {shape[0] if isinstance(shape[0], int) else shape[0].value for shape in shapes}
    if len(firsts) > 1 or not isinstance(firsts.pop(), str):
        return list(samples)
    alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Mapping[str, Array]]] = {}
    for sample in samples:
        alike.setdefault(tuple((name, array.shape) for name, array in sample.items()), []).append(sample)
    step = max(1, most)
    groups = [calls[first : first + step] for calls in alike.values() for first in range(0, len(calls), step)]
    return [{name: np.concatenate([call[name] for call in calls]) for name in calls[0]} for calls in groups]


def _as_stored(model: ir.Model, node: ir.Node) -> ir.Value:
    """The node's float weight in the order of its quantized forms: [K, N] for a Gemm too."""
    weight = node.inputs[1]
    assert weight is not None
    if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
        return _put(model, node, "Transpose", [weight], {"perm": [1, 0]})
    return weight


def _put(
    model: ir.Model, before: ir.Node, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
) -> ir.Value:
    node = ir.node(op, inputs, attributes or {})
    model.graph.insert_before(before, node)
    return node.outputs[0]
