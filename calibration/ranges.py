"""Ranges of activations, from real runs of a float graph through ONNX Runtime.

Memory is bounded: each tensor is reduced to a histogram of magnitudes as soon as it is seen, and a graph whose tensors would not fit
together is run in groups. Nothing is random, so the same inputs give the same ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from calibration.weights import INT8_PEAK
from runtime.errors import InvalidInput
from runtime.signature import Array

BINS: Final = 4096
CLIPS: Final = tuple(1 - i / 50 for i in range(36))
"""Shares of the largest magnitude tried as the peak that int8 spans."""
GROUP_BYTES: Final = 512 << 20
"""Activations that one run may return together, of the size they have with the first input."""


class Range(NamedTuple):
    """What was seen of an activation tensor: the magnitude `peak` that int8 should span, and its signal to noise ratio then, in dB."""

    peak: float
    snr_db: float


class Histogram:
    """How often each magnitude was seen: BINS equal bins from 0 to `top`, which doubles when something larger comes."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.top = 0.0
        self.largest = 0.0

    def add(self, values: Array) -> None:
        """Count magnitudes. Raises ValueError for NaN and infinity."""
        magnitudes = np.abs(values, dtype=np.float32).reshape(-1)
        largest = float(magnitudes.max(initial=0))
        if not np.isfinite(largest):
            raise ValueError("holds NaN or infinity")
        self.largest = max(self.largest, largest)
        if largest == 0:
            self.counts[0] += magnitudes.size
            return
        if self.top == 0:
            self.top = 2.0 ** np.ceil(np.log2(largest))  # a power of two, so that doubling later is exact
        while self.top < largest:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.top *= 2
        magnitudes *= np.float32(BINS / self.top)
        self.counts += np.bincount(np.minimum(magnitudes.astype(np.int32), BINS - 1), minlength=BINS)

    def range(self) -> Range:
        """The peak of least squared error, and the signal to noise ratio it gives. A tensor that is always zero loses nothing."""
        centers = (np.arange(BINS, dtype=np.float64) + 0.5) * (self.top / BINS)
        used = np.flatnonzero(self.counts)
        values = centers[used]
        counts = self.counts[used].astype(np.float64)
        if self.largest == 0:
            return Range(0.0, math.inf)
        peaks = [self.largest * share for share in CLIPS]
        errors = [float(np.dot(counts, _error(values, peak))) for peak in peaks]
        best = int(np.argmin(errors))
        power = float(np.dot(counts, values**2))
        return Range(peaks[best], 10 * math.log10(power / errors[best]) if errors[best] else math.inf)


def _error(values: NDArray[np.float64], peak: float) -> NDArray[np.float64]:
    """Squared error of each magnitude when int8 spans `peak`."""
    step = peak / INT8_PEAK
    return (values - step * np.minimum(np.rint(values / step), INT8_PEAK)) ** 2


def collect_ranges(graph: Path, tensors: Sequence[str], samples: Sequence[Mapping[str, Array]]) -> dict[str, Range]:
    """The range of each named tensor of the float graph (`model.onnx` beside its weights) over the captured inputs.

    Raises InvalidInput when there are no samples, the graph has no such tensor, or a tensor held NaN or infinity.
    """
    if not tensors:
        return {}
    if not samples:
        raise InvalidInput(
            "samples", f"are none, expected at least one captured input for {graph.parent.name}: calibrate with more prompts"
        )
    histograms = {name: Histogram() for name in tensors}
    for group in _groups(_element_counts(graph, tensors, samples[0])):
        session = _session(graph, group)
        for sample in samples:
            for name, values in zip(group, session.run(group, dict(sample)), strict=True):
                try:
                    histograms[name].add(values)
                except ValueError as error:
                    raise InvalidInput("samples", f"tensor '{name}' of {graph.parent.name} {error}: it cannot be calibrated") from None
    return {name: histogram.range() for name, histogram in histograms.items()}


def _element_counts(graph: Path, tensors: Sequence[str], sample: Mapping[str, Array]) -> dict[str, int]:
    """How many elements each tensor has with this input: a run that keeps none of them."""
    sizes = [f"{name}/Size" for name in tensors]
    session = _session(graph, tensors, sizes)
    return {name: int(size) for name, size in zip(tensors, session.run(sizes, dict(sample)), strict=True)}


def _groups(elements: Mapping[str, int]) -> list[list[str]]:
    """Names in order, as many together as may be in memory at once."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, count in elements.items():
        if groups[-1] and held + 4 * count > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += 4 * count
    return groups


def _session(graph: Path, tensors: Sequence[str], sizes: Sequence[str] = ()) -> Any:
    """A session whose outputs are these tensors, or with `sizes` only how many elements each has."""
    model = ir.load(graph)
    values = ir.convenience.create_value_mapping(model.graph)
    missing = [name for name in tensors if name not in values]
    if missing:
        raise InvalidInput("tensors", f"{graph} has no tensor {', '.join(missing[:3])}: the ranges asked for are those of another graph")
    outputs = [values[name] for name in tensors]
    if sizes:
        nodes = [ir.node("Size", [value]) for value in outputs]
        for node, name in zip(nodes, sizes, strict=True):
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.INT64, ir.Shape([])
        model.graph.extend(nodes)
        outputs = [node.outputs[0] for node in nodes]
    model.graph.outputs[:] = outputs
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"])
