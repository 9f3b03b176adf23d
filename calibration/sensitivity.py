"""What each layer's quantization does to a submodel's output, measured: one graph of all alternatives, with a switch for each layer.

The switched graph computes each layer's float weight and its quantized forms and lets a `choice` input pick one, so an assignment of any
kind is tried by running the same session again with other numbers. Noise is the squared difference from the float output as a share of its
power; small noises of different layers add up, which `calibration.search` relies on and checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.lean import lean_session
from calibration.quantize import LayerPlan, add_activation, add_initializer, add_weight, name_of, weight_layers
from calibration.tuning import Tuning
from runtime.errors import InvalidInput
from runtime.signature import Array

CHOICE: Final = "choice"
FLOAT: Final = 0

Choice = NDArray[np.int64]
"""For each layer 0 (float) or 1 + the index of its alternative."""


@dataclass(frozen=True)
class Alternative:
    """A form that a layer may take, and the noise on the output when only this layer takes it."""

    plan: LayerPlan
    noise: float


def snr_db(noise: float) -> float:
    """Signal to noise ratio of a relative noise power, at most 200."""
    return min(200.0, -10 * log10(noise)) if noise > 0 else 200.0


class Board:
    """A submodel whose layers can be switched between forms. `recipes` are plans of all layers, each of which is one form."""

    def __init__(
        self,
        model: ir.Model,
        recipes: Sequence[Sequence[LayerPlan]],
        tuning: Tuning,
        samples: Sequence[Mapping[str, Array]],
    ) -> None:
        """Raises InvalidInput when there are no samples."""
        if not samples:
            raise InvalidInput("samples", "are none, expected captured inputs to measure sensitivity with: calibrate with more requests")
        self._model = model
        self.layers = [name_of(layer.node) for layer in weight_layers(model)]
        self.forms = [{planned.node: planned for planned in recipe} for recipe in recipes]
        self._outputs = [name_of(value) for value in model.graph.outputs][:1]  # states follow: the first output is what is asked for
        self._session: Any = lean_session(_switched(model, self.forms, tuning))
        self._samples = samples
        self._reference = [self._run(np.zeros(len(self.layers), np.int64), sample) for sample in samples]
        self._power = sum(float(np.square(array, dtype=np.float64).sum()) for array in self._reference)

    def noise(self, choice: Choice) -> float:
        """Relative noise power of the output under an assignment, over all samples."""
        pairs = zip(self._reference, self._samples, strict=True)
        error = sum(float(np.sum(np.square(np.subtract(self._run(choice, sample), wanted, dtype=np.float64)))) for wanted, sample in pairs)
        return error / (self._power or 1.0)

    def alternatives(self) -> list[list[Alternative]]:
        """For each layer its forms other than float, without those that are the same, and what each does alone."""
        found = []
        for index, node in enumerate(self.layers):
            forms: dict[LayerPlan, float] = {}
            for number, plans in enumerate(self.forms, 1):
                planned = replace(plans[node], reason="")
                if planned.weight_type != "float" and planned not in forms:
                    choice = np.zeros(len(self.layers), np.int64)
                    choice[index] = number
                    forms[planned] = self.noise(choice)
            found.append([Alternative(planned, noise) for planned, noise in forms.items()])
        return found

    def work(self) -> list[int]:
        """Multiply-accumulates of each layer over the first sample."""
        return _multiplications(self._model, self.layers, self._samples[0]) if self.layers else []

    def choice(self, plans: Sequence[LayerPlan]) -> Choice:
        """The assignment that these plans, each one of the forms, stand for."""
        chosen = {planned.node: planned for planned in plans}
        return np.array([self._number(node, chosen[node]) for node in self.layers], np.int64)

    def _number(self, node: str, planned: LayerPlan) -> int:
        if planned.weight_type == "float":
            return FLOAT
        return 1 + next(number for number, plans in enumerate(self.forms) if replace(plans[node], reason=planned.reason) == planned)

    def _run(self, choice: Choice, sample: Mapping[str, Array]) -> Array:
        (output,) = self._session.run(self._outputs, {**sample, CHOICE: choice})
        return np.asarray(output)


def _switched(model: ir.Model, forms: Sequence[Mapping[str, LayerPlan]], tuning: Tuning) -> ir.Model:
    """The float graph with each layer's operands behind Where nodes that `choice` int64 [layers] controls."""
    switched = model.clone()
    layers = list(weight_layers(switched))
    choice = ir.Value(name=CHOICE, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(layers)]))
    switched.graph.inputs.append(choice)
    weights: dict[tuple[str, str, int], ir.Value] = {}
    activations: dict[str, ir.Value] = {}
    for index, layer in enumerate(layers):
        source, weight = layer.node.inputs[0], _as_stored(switched, layer.node)
        assert source is not None
        chosen = _put(switched, layer.node, "Gather", [choice, _constant(switched, index)])
        read, multiplied = source, weight
        for number, plans in enumerate(forms, 1):
            planned = plans[name_of(layer.node)]
            if planned.weight_type == "float":
                continue
            here = _put(switched, layer.node, "Equal", [chosen, _constant(switched, number)])
            key = planned.weight, planned.weight_type, planned.block
            if key not in weights:
                weights[key] = add_weight(switched, layer, planned, tuning.importance.get(name_of(source)))
            multiplied = _put(switched, layer.node, "Where", [here, weights[key], multiplied])
            if planned.activation:
                name = name_of(source)
                if name not in activations:
                    activations[name] = add_activation(switched, layer.node, tuning.ranges[name])
                read = _put(switched, layer.node, "Where", [here, activations[name], read])
        layer.node.replace_input_with(0, read)
        layer.node.replace_input_with(1, multiplied)
    return switched


def _multiplications(model: ir.Model, layers: Sequence[str], sample: Mapping[str, Array]) -> list[int]:
    """Outputs of each layer times the inputs that each is summed over."""
    counted = model.clone()
    nodes = {name_of(layer.node): layer for layer in weight_layers(counted)}
    sizes = [ir.node("Size", [nodes[name].node.outputs[0]]) for name in layers]
    counted.graph.extend(sizes)
    for index, size in enumerate(sizes):
        value = size.outputs[0]
        value.name, value.dtype, value.shape = f"{CHOICE}.size.{index}", ir.DataType.INT64, ir.Shape([])
    counted.graph.outputs[:] = [size.outputs[0] for size in sizes]
    found = lean_session(counted).run(None, dict(sample))
    return [int(size) * nodes[name].matrix[0] for name, size in zip(layers, found, strict=True)]


def _as_stored(model: ir.Model, node: ir.Node) -> ir.Value:
    """The node's float weight in the order of its quantized forms: [K, N] for a Gemm too."""
    weight = node.inputs[1]
    assert weight is not None
    if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
        return _put(model, node, "Transpose", [weight], {"perm": [1, 0]})
    return weight


def _put(model: ir.Model, before: ir.Node, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
    node = ir.node(op, inputs, attributes or {})
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _constant(model: ir.Model, number: int) -> ir.Value:
    name = f"{CHOICE}.{number}"
    return model.graph.initializers.get(name) or add_initializer(model, name, ir.tensor(np.array(number, np.int64)))
