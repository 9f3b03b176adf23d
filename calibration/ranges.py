"""Ranges and channel statistics of activations, from real runs of a float graph through ONNX Runtime.

Memory is bounded: each tensor is reduced to a histogram of magnitudes, or to sums and a few rows, as soon as it is seen, and a graph whose
tensors would not fit together is run in groups. Nothing is random, so the same inputs give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from calibration.weights import INT8_PEAK, Floats
from runtime.errors import InvalidInput, did_you_mean
from runtime.signature import Array

BINS: Final = 4096
CLIPS: Final = tuple(1 - i / 50 for i in range(36))
"""Shares of the largest magnitude tried as the peak that int8 spans."""
GROUP_BYTES: Final = 512 << 20
"""Activations that one run may return together, of the size they have with the first input."""


ROWS: Final = 128
"""Rows kept of each tensor, about: one at least of each call."""
CHUNK: Final = 1 << 20
"""Elements scaled in one step."""
PERCENTILE: Final = 99.99

Method = Literal["minmax", "percentile", "mse"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)


class Range(NamedTuple):
    """What was seen of an activation tensor: the magnitude `peak` that int8 should span, and its signal to noise ratio then, in dB.

    `method` is what chose the peak: the largest magnitude, a percentile of the magnitudes, or a search for the least squared error.
    """

    peak: float
    snr_db: float
    method: Method = "mse"


@dataclass(frozen=True)
class ChannelStats:
    """What was seen of each channel, the K entries of the last axis, of an activation tensor.

    Largest magnitude, mean magnitude and mean square, each float32 [K], over `count` rows, and `rows` [R, K]: some of them, evenly spread
    over each call. `parts` are the same of every other call and of the rest, so that what is chosen by one can be checked on the other;
    none where there was one call.
    """

    largest: Floats
    mean_magnitude: Floats
    mean_square: Floats
    rows: Floats
    count: int = 1
    parts: tuple[ChannelStats, ...] = ()

    @classmethod
    def merged(cls, parts: Sequence[ChannelStats]) -> ChannelStats:
        """Those of all calls, from those of some and of the others."""
        known = [part for part in parts if part.count]
        if len(known) < 2:
            return (known or list(parts))[0]
        count = sum(part.count for part in known)
        return cls(
            np.maximum.reduce([part.largest for part in known]),
            np.sum([part.mean_magnitude * np.float32(part.count / count) for part in known], axis=0, dtype=np.float32),
            np.sum([part.mean_square * np.float32(part.count / count) for part in known], axis=0, dtype=np.float32),
            np.concatenate([part.rows for part in known]),
            count,
            tuple(known),
        )

    def divided(self, scales: Floats) -> ChannelStats:
        """Those of the same tensor with each channel divided by its scale (positive, [K])."""
        return ChannelStats(
            self.largest / scales,
            self.mean_magnitude / scales,
            self.mean_square / scales**2,
            self.rows / scales,
            self.count,
            tuple(part.divided(scales) for part in self.parts),
        )


class Histogram:
    """How often each magnitude was seen: BINS equal bins from 0 to `top`, which doubles when something larger comes."""

    def __init__(self) -> None:
        self.counts: NDArray[np.float64] = np.zeros(BINS)
        self.top = 0.0
        self.largest = 0.0

    def add(self, values: Array, weights: Floats | None = None) -> None:
        """Count magnitudes, [..., K] for `weights` [K] of the channels. Raises ValueError for NaN and infinity."""
        magnitudes = np.abs(values, dtype=np.float32).reshape(-1)
        largest = float(magnitudes.max(initial=0))
        if not np.isfinite(largest):
            raise ValueError("holds NaN or infinity")
        self.largest = max(self.largest, largest)
        counted = None if weights is None else np.broadcast_to(weights, values.shape).reshape(-1)
        if largest == 0:
            self.counts[0] += magnitudes.size if counted is None else counted.sum(dtype=np.float64)
            return
        if self.top == 0:
            self.top = 2.0 ** np.ceil(np.log2(largest))  # a power of two, so that doubling later is exact
        while self.top < largest:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.top *= 2
        magnitudes *= np.float32(BINS / self.top)
        self.counts += np.bincount(np.minimum(magnitudes.astype(np.int32), BINS - 1), counted, minlength=BINS)

    def range(self, method: Method | Literal["auto"] = "auto") -> Range:
        """The method's peak and its signal to noise ratio; with "auto", the method of least squared error, of equals the simplest.

        A tensor that is always zero loses nothing.
        """
        centers = (np.arange(BINS, dtype=np.float64) + 0.5) * (self.top / BINS)
        used = np.flatnonzero(self.counts)
        values, counts = centers[used], self.counts[used]
        tried = METHODS if method == "auto" else (method,)
        if self.largest == 0:
            return Range(0.0, math.inf, tried[0])
        peaks: dict[Method, Callable[[], list[float]]] = {
            "minmax": lambda: [self.largest],
            "percentile": lambda: [self._percentile()],
            "mse": lambda: [self.largest * share for share in CLIPS],
        }
        error, peak, winner = min(
            ((float(np.dot(counts, _error(values, peak))), peak, name) for name in tried for peak in peaks[name]()),
            key=lambda found: found[0],
        )
        power = float(np.dot(counts, values**2))
        return Range(peak, 10 * math.log10(power / error) if error else math.inf, winner)

    def _percentile(self) -> float:
        """The upper edge of the bin that PERCENTILE of the magnitudes do not exceed."""
        reached = int(np.searchsorted(np.cumsum(self.counts), PERCENTILE / 100 * self.counts.sum()))
        return min((reached + 1) * self.top / BINS, self.largest)


class Channels:
    """Sums over the channels of one tensor, and `wanted` rows of each call."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.count = 0
        self.largest: Any = 0.0
        self.magnitude: Any = 0.0
        self.square: Any = 0.0
        self.rows: list[Floats] = []

    def add(self, values: Array) -> None:
        """Sum [..., K]. Raises ValueError for NaN and infinity."""
        rows = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
        magnitudes = np.abs(rows)
        largest = magnitudes.max(axis=0, initial=0)
        if not np.isfinite(largest).all():
            raise ValueError("holds NaN or infinity")
        self.count += len(rows)
        self.largest = np.maximum(self.largest, largest)
        self.magnitude = self.magnitude + magnitudes.sum(axis=0, dtype=np.float64)
        self.square = self.square + np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        spread = np.linspace(0, len(rows) - 1, min(self.wanted, len(rows))).astype(int)
        self.rows.append(rows[spread])

    def stats(self) -> ChannelStats:
        count = max(self.count, 1)
        highest = float(np.finfo(np.float32).max)
        magnitude, square = (np.minimum(total / count, highest).astype(np.float32) for total in (self.magnitude, self.square))
        return ChannelStats(np.asarray(self.largest, np.float32), magnitude, square, np.concatenate(self.rows), self.count)


def _error(values: NDArray[np.float64], peak: float) -> NDArray[np.float64]:
    """Squared error of each magnitude when int8 spans `peak`."""
    step = peak / INT8_PEAK
    return (values - step * np.minimum(np.rint(values / step), INT8_PEAK)) ** 2


def collect_ranges(
    graph: Path,
    tensors: Sequence[str],
    samples: Sequence[Mapping[str, Array]],
    method: Method | Literal["auto"] = "auto",
    scales: Mapping[str, Floats] | None = None,
) -> dict[str, Range]:
    """The range of each named tensor of the float graph (`model.onnx` beside its weights) over the captured inputs.

    `scales` divides the channels of some tensors, positive float32 [K] each: their ranges after equalization, measured on the graph
    before it. Errors then count by the square of their channel's scale, for the weights that they meet are multiplied by it: both the range
    and the ratio are those that the products see.
    Raises InvalidInput for an unknown method, when there are no samples, the graph has no such tensor, or a tensor held NaN or infinity.
    """
    return collect(graph, tensors, (), samples, method, scales)[0]


def collect_stats(graph: Path, tensors: Sequence[str], samples: Sequence[Mapping[str, Array]]) -> dict[str, ChannelStats]:
    """The channel statistics of each named tensor; the rest as collect_ranges."""
    return collect(graph, (), tensors, samples)[1]


def collect(
    graph: Path,
    tensors: Sequence[str],
    channels: Sequence[str],
    samples: Sequence[Mapping[str, Array]],
    method: Method | Literal["auto"] = "auto",
    scales: Mapping[str, Floats] | None = None,
) -> tuple[dict[str, Range], dict[str, ChannelStats]]:
    """Ranges of some tensors and channel statistics of some, in the same runs; the rest as collect_ranges."""
    if method not in ("auto", *METHODS):
        raise InvalidInput("method", f"'{method}' is not known: {did_you_mean(method, ('auto', *METHODS))}")
    names = list(dict.fromkeys([*tensors, *channels]))
    if not names:
        return {}, {}
    if not samples:
        raise InvalidInput(
            "samples", f"are none, expected at least one captured input for {graph.parent.name}: calibrate with more prompts"
        )
    histograms = {name: _Divided((scales or {}).get(name)) for name in tensors}
    halves = [{name: Channels(-(-ROWS // len(samples))) for name in channels} for _ in samples[:2]]
    seen: list[list[Mapping[str, _Observer]]] = [[histograms, half] for half in halves]
    for group in _groups(_element_counts(graph, names, samples[0])):
        session = _session(graph, group)
        for i, sample in enumerate(samples):
            for name, values in zip(group, session.run(group, dict(sample)), strict=True):
                try:
                    for observers in seen[i % 2]:
                        if name in observers:
                            observers[name].add(values)
                except ValueError as error:
                    raise InvalidInput("samples", f"tensor '{name}' of {graph.parent.name} {error}: it cannot be calibrated") from None
    return (
        {name: found.histogram.range(method) for name, found in histograms.items()},
        {name: ChannelStats.merged([half[name].stats() for half in halves]) for name in channels},
    )


class _Observer(Protocol):
    def add(self, values: Array) -> None: ...


class _Divided:
    """A histogram of what is left when each channel is divided by its scale; errors count as they are once it is multiplied again."""

    def __init__(self, scales: Floats | None) -> None:
        self.histogram, self.scales = Histogram(), scales

    def add(self, values: Array) -> None:
        if self.scales is None:
            self.histogram.add(values)
            return
        rows = values.reshape(-1, len(self.scales))
        step = max(1, CHUNK // len(self.scales))
        for start in range(0, len(rows), step):
            self.histogram.add(rows[start : start + step].astype(np.float32) / self.scales, self.scales**2)


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
