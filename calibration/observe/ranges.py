"""Ranges and channel statistics of activations, from real runs of a float graph through ONNX Runtime.

The graph itself reduces each tensor, as soon as it is there, to its extremes, its sums and some of its values, evenly
spread: one run of each input on mapped weights tells everything, in little more memory than the run takes. Nothing is
random, so the same inputs give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.ground.progress import each
from calibration.observe.lean import lean_session, rows_of
from calibration.quantize.weights import INT8_PEAK, Floats
from runtime.bundle.signature import Array
from runtime.errors import InvalidInput, did_you_mean
from runtime.targets.lowering.activation_ranges import CODES, affine

BINS: Final = 4096
CLIPS: Final = tuple(1 - i / 50 for i in range(36))
"""Shares of the largest magnitude tried as the peak that int8 spans."""
VALUES: Final = 1 << 18
"""Values kept of each tensor over all calls, at least, where there are so many; at most about three times as many."""
ROWS: Final = 128
"""Rows kept of each tensor for `ChannelStats`, about: one at least of each call."""
PERCENTILE: Final = 99.99
WORTH: Final = 1.0
"""Gain in dB from which a zero point is worth having."""

Method = Literal["minmax", "percentile", "mse"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)


class Range(NamedTuple):
    """What was seen of an activation tensor: the magnitude `peak` that int8 should span, and its signal to noise ratio
    then, in dB.

    `method` is what chose the peak: the largest magnitude, a percentile of the magnitudes, or a search for the least
    squared error. `low` and `high` are what 8 bits with a zero point would better span, for targets that have such: a
    tensor that lies mostly on one side of zero, such as SiLU's, wastes almost half of the symmetric codes. Both are 0
    where that would gain less than WORTH.
    """

    peak: float
    snr_db: float
    method: Method = "mse"
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class ChannelStats:
    """What was seen of each channel, the K entries of the last axis, of an activation tensor.

    Largest magnitude, mean magnitude and mean square, each float32 [K], over `count` rows, and `rows` [R, K]: some of
    them, evenly spread over each call. `parts` are the same of every other call and of the rest, so that what is chosen
    by one can be checked on the other; none where there was one call.
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
    """How often each value was seen: BINS equal bins of magnitudes from 0 to `top`, which doubles when something larger
    comes.

    `signed` [2, BINS] has those that are not negative, and the others.
    """

    def __init__(self) -> None:
        self.signed: NDArray[np.float64] = np.zeros((2, BINS))
        self.top = 0.0
        self.largest = 0.0

    @property
    def counts(self) -> NDArray[np.float64]:
        """Of magnitudes, [BINS]."""
        return self.signed.sum(axis=0)

    def add(self, values: Array, weights: Floats | None = None, times: float = 1.0) -> None:
        """Count values `times` each, [..., K] for `weights` [K] of the channels. Raises ValueError for NaN and
        infinity.
        """
        flat = np.asarray(values, np.float32).reshape(-1)
        magnitudes = np.abs(flat)
        largest = float(magnitudes.max(initial=0))
        if not np.isfinite(largest):
            raise ValueError("holds NaN or infinity")
        self.largest = max(self.largest, largest)
        counted = None if weights is None else np.broadcast_to(weights, values.shape).reshape(-1)
        if largest == 0:
            self.signed[0, 0] += times * (magnitudes.size if counted is None else counted.sum(dtype=np.float64))
            return
        if self.top == 0:
            self.top = 2.0 ** np.ceil(np.log2(largest))  # a power of two, so that doubling later is exact
        while self.top < largest:
            self.signed[:, : BINS // 2] = self.signed.reshape(2, -1, 2).sum(axis=2)
            self.signed[:, BINS // 2 :] = 0
            self.top *= 2
        magnitudes *= np.float32(BINS / self.top)
        bins = np.minimum(magnitudes.astype(np.int32), BINS - 1) + BINS * (flat < 0)
        self.signed += times * np.bincount(bins, counted, minlength=2 * BINS).reshape(2, BINS)

    def range(self, method: Method | Literal["auto"] = "auto") -> Range:
        """The method's peak and its signal to noise ratio; with "auto", the method of least squared error, of equals
        the simplest.

        A tensor that is always zero loses nothing.
        """
        values, counts = self._seen(None)
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

    def spanned(self, found: Range) -> Range:
        """The same range, and what 8 bits with a zero point would better span, if they would."""
        (above, often), (below, others) = self._seen(0), self._seen(1)
        values, counts = np.concatenate([above, -below]), np.concatenate([often, others])
        error = float(np.dot(counts, _error(np.abs(values), found.peak))) if found.peak else 0.0
        if not error:
            return found
        less, low, high = _best_span(values, counts)
        return found._replace(low=low, high=high) if less * 10 ** (WORTH / 10) <= error else found

    def _seen(self, negative: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Magnitudes that were seen, of either sign or of both, and how often."""
        counts = self.counts if negative is None else self.signed[negative]
        used = np.flatnonzero(counts)
        return np.asarray((used + 0.5) * (self.top / BINS), np.float64), counts[used]

    def _percentile(self) -> float:
        """The upper edge of the bin that PERCENTILE of the magnitudes do not exceed."""
        reached = int(np.searchsorted(np.cumsum(self.counts), PERCENTILE / 100 * self.counts.sum()))
        return min((reached + 1) * self.top / BINS, self.largest)


class Channels:
    """Sums over the channels of one tensor, and some rows of each call."""

    def __init__(self) -> None:
        self.count = 0
        self.largest: Any = 0.0
        self.magnitude: Any = 0.0
        self.square: Any = 0.0
        self.rows: list[Floats] = []

    def add(self, count: int, largest: Floats, magnitude: Floats, square: Floats, rows: Floats) -> None:
        """Add sums over `count` rows: the largest magnitude, the sum of magnitudes and of squares, each [K]; and some
        rows [R, K].
        """
        self.count += count
        self.largest = np.maximum(self.largest, largest)
        self.magnitude = self.magnitude + magnitude.astype(np.float64)
        self.square = self.square + square.astype(np.float64)
        self.rows.append(rows)

    def stats(self, wanted: int = ROWS) -> ChannelStats:
        """What was seen, with about `wanted` of the rows, evenly spread over the calls."""
        count = max(self.count, 1)
        highest = float(np.finfo(np.float32).max)
        magnitude, square = (
            np.minimum(total / count, highest).astype(np.float32) for total in (self.magnitude, self.square)
        )
        each = -(-wanted // max(len(self.rows), 1))
        rows = [rows[np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)] for rows in self.rows]
        return ChannelStats(np.asarray(self.largest, np.float32), magnitude, square, np.concatenate(rows), self.count)


class _Seen(NamedTuple):
    """One tensor of one call: every `step`th of its values, or of its rows [R, K], and what is largest in magnitude, of
    each or all.
    """

    values: Floats
    step: int
    extreme: Floats

    def into(self, histogram: Histogram, scales: Floats | None) -> None:
        """Count the values, divided by the scales of their channels: errors then as they are once they are multiplied
        again.

        Each call counts by the inverse of its power: what matters to it is the noise beside its own signal, and a few
        loud calls, such as late steps of a sampler, would have the quiet ones rounded away.
        """
        values, extreme, weights = self.values, self.extreme, None
        share = 1 / max(float(np.square(values, dtype=np.float64).sum()), 1e-200)
        if scales is not None:
            values, extreme, weights = values / scales, extreme / scales, scales**2
        histogram.add(values, weights, share)
        if self.step > 1:  # else it was among the values
            top = np.argmax(np.abs(extreme))
            histogram.add(
                extreme.reshape(-1)[top : top + 1],
                None if weights is None else weights[top : top + 1],
                share / self.step,
            )


class Observation:
    """What was seen of some tensors of a graph over all calls: all of them as they are read, some by channel."""

    def __init__(self) -> None:
        self._seen: dict[str, list[_Seen]] = {}
        self._powers: dict[str, list[float]] = {}
        self._channels: dict[str, tuple[Channels, Channels]] = {}

    def ranges(
        self,
        names: Sequence[str],
        method: Method | Literal["auto"] = "auto",
        scales: Mapping[str, Floats] | None = None,
    ) -> dict[str, Range]:
        """The range of each named tensor.

        `scales` divides the channels of some of those seen by channel, positive float32 [K] each: their ranges after
        equalization, measured on the graph before it. Errors then count by the square of their channel's scale, for the
        weights that they meet are multiplied by it: both the range and the ratio are those that the products see.
        Raises InvalidInput for an unknown method.
        """
        if method not in ("auto", *METHODS):
            raise InvalidInput("method", f"'{method}' is not known: {did_you_mean(method, ('auto', *METHODS))}")
        found = {}
        for name in names:
            histogram = Histogram()
            for seen in self._seen[name]:
                seen.into(histogram, (scales or {}).get(name))
            found[name] = histogram.range(method)
            if method == "auto":
                found[name] = histogram.spanned(found[name])
        return found

    @property
    def stats(self) -> dict[str, ChannelStats]:
        """The channel statistics of each tensor seen so: of every other call and of the rest, merged."""
        return {
            name: ChannelStats.merged(
                [half.stats(ROWS // 2 if halves[1].rows else ROWS) for half in halves if half.rows]
            )
            for name, halves in self._channels.items()
        }

    def ratio(self, part: str, whole: str) -> float:
        """The power of one tensor beside that of another, both observed, each call counting alike."""
        pairs = zip(self._powers[part], self._powers[whole], strict=True)
        return float(np.mean([own / max(other, 1e-200) for own, other in pairs]))

    def add(self, name: str, call: int, found: Mapping[str, Any]) -> None:
        """Add what the graph said of a tensor. Raises ValueError when it held NaN or infinity."""
        if "power" in found:
            if not np.isfinite(found["power"]):
                raise ValueError("holds NaN or infinity")
            self._powers.setdefault(name, []).append(float(found["power"]))
        if "values" not in found:
            return
        largest = np.asarray(np.maximum(found["max"], -found["min"]))
        if (
            not np.isfinite(largest).all() or np.isnan(found["magnitude"]).any()
        ):  # a maximum may pass over NaN, a sum does not
            raise ValueError("holds NaN or infinity")
        extreme = np.where(largest == found["max"], largest, -largest)
        self._seen.setdefault(name, []).append(_Seen(found["values"], int(found["step"][0]), extreme))
        if "square" in found:
            halves = self._channels.setdefault(name, (Channels(), Channels()))
            halves[call % 2].add(int(found["count"][0]), largest, found["magnitude"], found["square"], found["values"])


def _error(values: NDArray[np.float64], peak: float) -> NDArray[np.float64]:
    """Squared error of each magnitude when int8 spans `peak`."""
    step = peak / INT8_PEAK
    return (values - step * np.minimum(np.rint(values / step), INT8_PEAK)) ** 2


def _best_span(values: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float, float]:
    """The least squared error of 8 bits with a zero point, and what they span then: each end in turn is drawn in from
    the extreme.
    """
    ends = [min(float(values.min()), 0.0), max(float(values.max()), 0.0)]
    extremes, least = list(ends), math.inf
    for end in (1, 0, 1, 0):
        for share in CLIPS:
            tried = list(ends)
            tried[end] = extremes[end] * share
            error = float(np.dot(counts, _span_error(values, *tried)))
            if error < least:
                least, ends = error, tried
    return least, ends[0], ends[1]


def _span_error(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Squared error of each value when 256 codes span `low` to `high`, one of them zero itself."""
    step, zero = affine(low, high)
    return (values - step * (np.clip(np.rint(values / step) + zero, 0, CODES - 1) - zero)) ** 2


def observe(
    model: ir.Model,
    tensors: Sequence[str],
    channels: Sequence[str],
    samples: Sequence[Mapping[str, Array]],
    powers: Sequence[str] = (),
) -> Observation:
    """Run a float graph on the captured inputs; what is seen of the named tensors, of some by channel, their last axis.

    Of those in `powers`, their sums of squares.

    Raises InvalidInput when there are no samples, the graph has no such tensor, or one held NaN or infinity.
    """
    names = [*dict.fromkeys([*channels, *tensors, *powers])]
    found = Observation()
    if not names:
        return found
    if not samples:
        raise InvalidInput(
            "samples",
            f"are none, expected at least one captured input for {model.graph.name}: calibrate with more prompts",
        )
    wanted = {name: _Wanted(name in {*tensors, *channels}, name in channels, name in powers) for name in names}
    watched, outputs = _watched(model, wanted, len(samples))
    session = lean_session(watched)
    requested = [output for every in outputs.values() for output in every.values()]
    for call, sample in enumerate(each("call", samples)):
        for row in rows_of(sample, session):
            values = iter(session.run(requested, row))
            for name, every in outputs.items():
                try:
                    found.add(name, call, {key: next(values) for key in every})
                except ValueError as error:
                    raise InvalidInput(
                        "samples", f"tensor '{name}' of {model.graph.name} {error}: it cannot be calibrated"
                    ) from None
    return found


def collect_ranges(
    model: ir.Model,
    tensors: Sequence[str],
    samples: Sequence[Mapping[str, Array]],
    method: Method | Literal["auto"] = "auto",
    scales: Mapping[str, Floats] | None = None,
) -> dict[str, Range]:
    """The range of each named tensor, as `observe` and `Observation.ranges` find it."""
    return observe(model, tensors, [name for name in tensors if name in (scales or {})], samples).ranges(
        tensors, method, scales
    )


class _Wanted(NamedTuple):
    """What is to be known of a tensor: extremes and values, by channel, and its sum of squares."""

    values: bool
    by_channel: bool
    power: bool


def _watched(model: ir.Model, wanted: Mapping[str, _Wanted], calls: int) -> tuple[ir.Model, dict[str, dict[str, str]]]:
    """The graph that gives back what is to be known of each tensor instead of its outputs, and by which names.

    ONNX Runtime visits the last of the nodes that nothing reads first: those of the first tensor stand at the end, so
    that each tensor is reduced before the next is computed.
    """
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    missing = [name for name in wanted if name not in values]
    if missing:
        raise InvalidInput(
            "tensors",
            f"{model.graph.name} has no tensor {', '.join(missing[:3])}: the requested ranges are those of another "
            "graph",
        )
    place = {node: number for number, node in enumerate(copy.graph)}
    ordered = sorted(wanted, key=lambda name: place.get(values[name].producer(), -1))  # type: ignore[arg-type]
    constants = _Constants(copy)
    copy.graph.outputs.clear()
    requested = {}
    for name in reversed(ordered):
        nodes, outputs = _reduced(values[name], constants, wanted[name], calls)
        copy.graph.extend(nodes)
        copy.graph.outputs.extend(outputs.values())
        requested[name] = {key: str(value.name) for key, value in outputs.items()}
    return copy, requested


class _Constants:
    """Integers of a graph as initializers, each once."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._made = model, dict[tuple[int, ...], ir.Value]()

    def __call__(self, *integers: int) -> ir.Value:
        if integers not in self._made:
            name = f"watched.{'_'.join(map(str, integers))}"
            tensor = ir.tensor(np.array(integers, np.int64), name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(integers)]), const_value=tensor
            )
            self._model.graph.register_initializer(value)
            self._made[integers] = value
        return self._made[integers]


def _reduced(
    value: ir.Value, constant: _Constants, requested: _Wanted, calls: int
) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """Nodes that reduce a tensor, and what they give.

    max, min and magnitude (the sum of magnitudes): of all or of each channel; values: every `step`th, or rows [R, K];
    step: odd, so that neighbours of every alignment are among them. By channel square, the sums of squares, and count,
    the number of rows. power: the sum of all squares.
    """
    nodes: list[ir.Node] = []
    by_channel = requested.by_channel

    def add(
        op: str, *inputs: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT, rank: int = 1, **attributes: int
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{value.name}/watched/{len(nodes)}")
        nodes.append(node)
        found = node.outputs[0]
        found.name, found.dtype, found.shape = f"{node.name}:0", dtype, ir.Shape([None] * rank)
        return found

    outputs: dict[str, ir.Value] = {}
    if requested.power:
        outputs["power"] = add("ReduceSumSquare", value, keepdims=0, rank=0)
    if not requested.values:
        return nodes, outputs
    width = int(value.shape[-1]) if by_channel and value.shape is not None else 1  # type: ignore[arg-type]
    flat = add("Reshape", value, constant(-1, width) if by_channel else constant(-1), rank=2 if by_channel else 1)
    integer = ir.DataType.INT64
    count = add("Slice", add("Shape", flat, dtype=integer), constant(0), constant(1), dtype=integer)
    wanted = max(VALUES // width, ROWS if by_channel else 1)
    ratio = add("Div", count, constant(max(1, wanted // calls)), dtype=integer)
    less = add("Sub", add("Max", ratio, constant(1), dtype=integer), constant(1), dtype=integer)
    even = add("Mul", add("Div", less, constant(2), dtype=integer), constant(2), dtype=integer)
    step = add("Add", even, constant(1), dtype=integer)
    outputs |= {
        "values": add("Slice", flat, constant(0), constant(2**62), constant(0), step, rank=2 if by_channel else 1),
        "step": step,
    }
    axis = constant(0)
    sums = {"max": "ReduceMax", "min": "ReduceMin", "magnitude": "ReduceL1"} | (
        {"square": "ReduceSumSquare"} if by_channel else {}
    )
    for key, op in sums.items():
        outputs[key] = add(op, flat, axis, keepdims=0, rank=1 if by_channel else 0)
    if by_channel:
        outputs["count"] = count
    return nodes, outputs
