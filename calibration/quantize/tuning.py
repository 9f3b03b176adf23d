"""What calibration finds out for one submodel, from its captured inputs: how to fold, how far int8 reaches, which
channels matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.ground.progress import phase
from calibration.observe.attention import attention_in_half
from calibration.observe.ranges import Range, collect_ranges, observe
from calibration.quantize.equalize import Fold, decibel, equalize, find_folds, folded_scales, folded_stats
from calibration.quantize.layers import sums
from calibration.quantize.plan import LEAST_SNR, LayerPlan, activation_tensors, measured_tensors, plan, spare
from calibration.quantize.qdq import activation_ranges, quantize
from calibration.quantize.recipes import Recipe
from calibration.quantize.weights import Floats, Known
from runtime.bundle.signature import Array


@dataclass(frozen=True)
class Tuning:
    """Scales to fold into a float graph, and of the folded graph the activations' ranges and the mean square of their
    channels.

    `codes` are int4 weights made before, and `compensated` what they leave of their layers' outputs, by weight
    (`calibration.quantize.gptq`). `dilution` is how far the outputs of layers are below the sums that they are added to
    (`calibration.quantize.layers.sums`), `attention` the signal to noise ratio of each attention in bfloat16
    (`calibration.observe.attention`), all in dB, the last two by node.

    Empty, it leaves the graph as it is and its weights to be rounded without data.
    """

    folds: Sequence[Fold] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    importance: Mapping[str, Floats] = field(default_factory=dict)
    codes: Mapping[tuple[str, int, bool], Known] = field(default_factory=dict)
    compensated: Mapping[str, float] = field(default_factory=dict)
    dilution: Mapping[str, float] = field(default_factory=dict)
    attention: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, model: ir.Model, recipe: Recipe, samples: Sequence[Mapping[str, Array]]) -> Tuning:
        """Run the float graph on the samples, each once. Raises InvalidInput when they are none or give numbers that
        are not finite.
        """
        tensors = activation_tensors(model, recipe)
        if recipe.naive:
            return cls(ranges=collect_ranges(model, tensors, samples, method="minmax"))
        layers = plan(model, recipe)  # without ranges: all that could be int8
        channels = (
            measured_tensors(model, layers) if len(samples) > 1 else []
        )  # one call cannot tell what holds for the next
        landings = sums(model) if tensors else {}
        with phase(0.0, 0.5):
            seen = observe(model, tensors, channels, samples, [name for pair in landings.values() for name in pair])
        with phase(0.5, 0.9):
            folds = find_folds(model, layers, seen.stats)
        ranges = seen.ranges(tensors, scales=folded_scales(folds))
        importance = {name: stats.mean_square for name, stats in folded_stats(seen.stats, folds).items()}
        dilution = {node: max(0.0, decibel(seen.ratio(*pair))) for node, pair in landings.items()}
        with phase(0.9, 1.0):
            attention = attention_in_half(model, samples) if tensors else {}
        return cls(folds, ranges, importance, dilution=dilution, attention=attention)

    def plan(self, folded: ir.Model, recipe: Recipe) -> list[LayerPlan]:
        """What a recipe makes of each layer of the folded graph, knowing this."""
        return spare(plan(folded, recipe, self.ranges, self.dilution), self.compensated)

    def folded(self, model: ir.Model) -> ir.Model:
        """The graph that ranges and importance are of; what it computes is the same."""
        return equalize(model, self.folds) if self.folds else model

    def activation_ranges(self, folded: ir.Model, plans: Sequence[LayerPlan]) -> dict[str, tuple[float, float]]:
        """Activation ranges for targets with zero points, by the name of the QuantizeLinear node."""
        return activation_ranges(plans, folded, self.ranges)

    def bfloat16(self, plans: Sequence[LayerPlan]) -> tuple[str, ...]:
        """Attentions that may compute in bfloat16 beside the layers of these plans: those that lose no more than int8
        inputs may.
        """
        if not any(planned.activation for planned in plans):
            return ()
        return tuple(node for node, snr_db in self.attention.items() if snr_db >= LEAST_SNR)

    def quantize(self, folded: ir.Model, plans: Sequence[LayerPlan]) -> ir.Model:
        """Carry out plans for the folded graph."""
        return quantize(folded, plans, self.ranges, self.importance, self.codes)

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "folds": [fold.record() for fold in self.folds],
            "ranges": {name: list(found) for name, found in self.ranges.items()},
            "importance": {name: values.tolist() for name, values in self.importance.items()},
            "dilution": dict(self.dilution),
            "attention": dict(self.attention),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Tuning:
        """What `record` gave."""
        return cls(
            [Fold.of_record(fold) for fold in record["folds"]],
            {name: Range(*values) for name, values in record["ranges"].items()},
            {name: np.array(values, np.float32) for name, values in record["importance"].items()},
            dilution=record["dilution"],
            attention=record["attention"],
        )
