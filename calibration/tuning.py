"""What calibration finds out for one submodel, from its captured inputs: how to fold, how far int8 reaches, which channels matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.equalize import Fold, equalize, find_folds, folded_scales, folded_stats
from calibration.quantize import LayerPlan, Recipe, activation_tensors, measured_tensors, plan, quantize
from calibration.ranges import Range, collect_ranges, observe
from calibration.weights import Floats, Known
from runtime.signature import Array


@dataclass(frozen=True)
class Tuning:
    """Scales to fold into a float graph, and of the folded graph the activations' ranges and the mean square of their channels.

    Empty, it leaves the graph as it is and its weights to be rounded without data.
    """

    folds: Sequence[Fold] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    importance: Mapping[str, Floats] = field(default_factory=dict)
    codes: Mapping[tuple[str, int], Known] = field(default_factory=dict)

    @classmethod
    def measure(cls, model: ir.Model, recipe: Recipe, samples: Sequence[Mapping[str, Array]]) -> Tuning:
        """Run the float graph on the samples, each once. Raises InvalidInput when they are none or give numbers that are not finite."""
        tensors = activation_tensors(model, recipe)
        if recipe.naive:
            return cls(ranges=collect_ranges(model, tensors, samples, method="minmax"))
        layers = plan(model, recipe)  # without ranges: all that could be int8
        channels = measured_tensors(model, layers) if len(samples) > 1 else []  # one call cannot tell what holds for the next
        seen = observe(model, tensors, channels, samples)
        folds = find_folds(model, layers, seen.stats)
        ranges = seen.ranges(tensors, scales=folded_scales(folds))
        return cls(folds, ranges, {name: stats.mean_square for name, stats in folded_stats(seen.stats, folds).items()})

    def folded(self, model: ir.Model) -> ir.Model:
        """The graph that ranges and importance are of; what it computes is the same."""
        return equalize(model, self.folds) if self.folds else model

    def quantize(self, folded: ir.Model, plans: Sequence[LayerPlan]) -> ir.Model:
        """Carry out plans for the folded graph."""
        return quantize(folded, plans, self.ranges, self.importance, self.codes)

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "folds": [fold.record() for fold in self.folds],
            "ranges": {name: list(found) for name, found in self.ranges.items()},
            "importance": {name: values.tolist() for name, values in self.importance.items()},
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Tuning:
        """What `record` gave."""
        return cls(
            [Fold.of_record(fold) for fold in record["folds"]],
            {name: Range(*values) for name, values in record["ranges"].items()},
            {name: np.array(values, np.float32) for name, values in record["importance"].items()},
        )
