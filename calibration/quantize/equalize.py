"""Scale migration: channels of a tensor made equal before they are quantized, at no cost when the graph runs.

Where matrix products read X, they may as well read X / s and multiply by diag(s) W: the float function is the same, and
s moves magnitude from where it cannot be expressed to where it can. 1 / s is folded into what makes X: the scale of a
norm, or the columns of the product before it. Which s, each from a paper, its one parameter alpha searched by the error
measured on sampled inputs:

    smoothquant   max|X|^alpha / max|W|^(1 - alpha)   int8 activations   Xiao et al. 2022, arXiv 2211.10438
    awq           mean|X|^alpha                       int4 weights       Lin et al. 2023, arXiv 2306.00978

Changed weights are computed from the checkpoint when they are read, so memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from calibration.ground.progress import each
from calibration.observe.ranges import ChannelStats, Histogram
from calibration.quantize.forms import input_step, restored
from calibration.quantize.layers import Layer, add_initializer, name_of, tensor_of, weight_layers
from calibration.quantize.plan import LEAST_SNR, LayerPlan
from calibration.quantize.sites import Blocked, Site, sites_of
from calibration.quantize.weights import INT8_PEAK, Floats, check, chunks, release
from runtime.errors import InvalidInput

ScalingMethod = Literal["smoothquant", "awq"]

ALPHAS: Final = tuple(i / 10 for i in range(1, 10))
COLUMNS: Final = 128
"""Columns of each weight, evenly spread, on which alphas are compared."""
LEAST_GAIN: Final = 0.2
"""Gain in dB below which a tensor stays as it is: no more than the sample's own error."""
SPREAD: Final = 1e3
"""Scales stay within 1 / SPREAD and SPREAD, so that weights stay within what float16 scales express."""


@dataclass(frozen=True)
class Fold:
    """What becomes of one tensor that MatMuls read: `scales` [K] divides its channels, or is None, and `reason` says
    why.

    `weights` are the initializers whose rows are multiplied, `into` those that absorb the division. `before_db` and
    `after_db` are the signal to noise ratios of the products on the sampled inputs, quantized as planned.
    """

    tensor: str
    kind: ScalingMethod
    weights: tuple[str, ...]
    into: tuple[str, ...] = ()
    alpha: float = 0.0
    before_db: float = math.nan
    after_db: float = math.nan
    reason: str = ""
    scales: Floats | None = field(default=None, compare=False, repr=False)

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"scales": None if self.scales is None else self.scales.tolist()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Fold:
        """The fold that was recorded."""
        scales, names = record["scales"], {name: tuple(record[name]) for name in ("weights", "into")}
        return cls(**{**record, **names, "scales": None if scales is None else np.array(scales, np.float32)})


def find_folds(model: ir.Model, layers: Sequence[LayerPlan], stats: Mapping[str, ChannelStats]) -> list[Fold]:
    """The scales that lower the error of what these plans make, for every tensor with statistics that planned MatMuls
    read, in graph order.

    A group with int8 activations gets SmoothQuant's, one with int4 weights AWQ's. Raises SourceError for weights that
    are not finite.
    """
    plans = {planned.node: planned for planned in layers}
    folds = []
    for tensor, group in each("scales of tensor", _groups(model).items()):
        planned = [plans[name_of(layer.node)] for layer in group]
        kind = _kind(planned)
        if kind is None or name_of(tensor) not in stats:
            continue
        fold = Fold(name_of(tensor), kind, tuple(name_of(layer.weight) for layer in group))
        try:
            sites = sites_of(tensor, group)
        except Blocked as blocked:
            folds.append(replace(fold, reason=str(blocked)))
            continue
        fold = replace(fold, into=tuple(dict.fromkeys(name_of(site.source) for site in sites)))
        folds.append(_search(fold, group, planned, stats[name_of(tensor)]))
    return folds


def equalize(model: ir.Model, folds: Iterable[Fold]) -> ir.Model:
    """A copy of the float graph, of the same function and the same names of nodes, weights and tensors, with these
    folds carried out.

    A changed weight is float32, whatever it was: to round it again would cost accuracy. Raises InvalidInput for folds
    of another graph.
    """
    copy = model.clone()
    groups = {name_of(tensor): (tensor, group) for tensor, group in _groups(copy).items()}
    for fold in folds:
        if fold.scales is None:
            continue
        tensor, group = groups.get(fold.tensor, (None, []))
        if tensor is None or tuple(name_of(layer.weight) for layer in group) != fold.weights:
            raise InvalidInput(
                "folds", f"scale '{fold.tensor}' for {', '.join(fold.weights)}, which this graph lacks: search it again"
            )
        for site in sites_of(tensor, group):
            _divide(copy, site, fold.scales)
        for layer in group:
            _scale_matrix(copy, layer, fold.scales, rows=True)
    common.RemoveUnusedNodesPass()(copy)
    return copy


def folded_stats(stats: Mapping[str, ChannelStats], folds: Iterable[Fold]) -> dict[str, ChannelStats]:
    """The channel statistics of the graph that `equalize` makes."""
    scales = folded_scales(folds)
    return {name: seen.divided(scales[name]) if name in scales else seen for name, seen in stats.items()}


def folded_scales(folds: Iterable[Fold]) -> dict[str, Floats]:
    """What divides each changed tensor, as `collect_ranges` takes it."""
    return {fold.tensor: fold.scales for fold in folds if fold.scales is not None}


def _groups(model: ir.Model) -> dict[ir.Value, list[Layer]]:
    """MatMuls with a weight, by the tensor they read."""
    groups: dict[ir.Value, list[Layer]] = {}
    for layer in weight_layers(model):
        source = layer.node.inputs[0]
        if layer.node.op_type == "MatMul" and source is not None:
            groups.setdefault(source, []).append(layer)
    return groups


def _kind(planned: Sequence[LayerPlan]) -> ScalingMethod | None:
    if any(one.activation for one in planned):
        return "smoothquant"
    return "awq" if any(one.block for one in planned) else None


# Which s is best.


def _search(fold: Fold, group: Sequence[Layer], planned: Sequence[LayerPlan], stats: ChannelStats) -> Fold:
    """The fold with the scales of the best alpha, or without any where none gains.

    An alpha is judged by the scales and the range that one half of the calls gives it, on rows of the other half, both
    ways: channels that are small in a few calls are not small in all, and what the first would gain by them is lost to
    clipping in others.
    """
    if not stats.largest.any():
        return replace(fold, reason="it was always zero")
    if len(stats.parts) < 2:
        return replace(fold, reason="a single call was seen: nothing to check a choice on")
    samples = [columns(layer) for layer in group]
    peaks = _row_peaks(group) if fold.kind == "smoothquant" else np.ones_like(stats.largest)
    halves = [stats.parts, stats.parts[::-1]]

    def noise(alpha: float | None) -> float:
        total = 0.0
        for known, new in halves:
            scales = np.ones_like(peaks) if alpha is None else _scales(fold.kind, alpha, known, peaks)
            scaled = [sample * scales[:, None] for sample in samples]
            total += _noise(scaled, planned, known.divided(scales), new.rows / scales, scales) / len(halves)
        return total

    noises = {alpha: noise(alpha) for alpha in ALPHAS}
    alpha = min(noises, key=noises.__getitem__)
    fold = replace(fold, alpha=alpha, before_db=decibel(noise(None)), after_db=decibel(noises[alpha]))
    if not fold.after_db >= fold.before_db + LEAST_GAIN:
        return replace(fold, reason=f"no alpha gains {LEAST_GAIN} dB")
    if fold.kind == "smoothquant" and fold.after_db < LEAST_SNR:
        return replace(
            fold,
            reason=f"its layers would have {fold.after_db:.1f} dB, less than the {LEAST_SNR:.0f} that int8 activations "
            "need",
        )
    return replace(fold, scales=_scales(fold.kind, alpha, stats, peaks))


def _scales(kind: ScalingMethod, alpha: float, stats: ChannelStats, peaks: Floats) -> Floats:
    """What the method divides each channel by, float32 [K], of geometric mean 1; 1 for channels or rows that are always
    zero.
    """
    alive = (stats.largest > 0) & (stats.mean_magnitude > 0) & (peaks > 0)
    if kind == "smoothquant":
        logs = alpha * np.log(stats.largest[alive].astype(np.float64)) - (1 - alpha) * np.log(
            peaks[alive].astype(np.float64)
        )
    else:
        logs = alpha * np.log(stats.mean_magnitude[alive].astype(np.float64))
    scales = np.ones_like(peaks)
    if alive.any():
        scales[alive] = np.exp(np.clip(logs - logs.mean(), -math.log(SPREAD), math.log(SPREAD)))
    return scales


def _noise(
    samples: Sequence[Floats], planned: Sequence[LayerPlan], known: ChannelStats, rows: Floats, scales: Floats
) -> float:
    """Noise of the products of rows relative to their signal, quantized as planned by what is known; the mean over the
    group.
    """
    quantized = _quantized(rows, known, scales) if any(one.activation for one in planned) else rows
    ratios = []
    for weights, one in zip(samples, planned, strict=True):
        exact = rows @ weights
        error = (quantized if one.activation else rows) @ restored(weights, one, known.mean_square) - exact
        ratios.append(
            float(np.square(error).sum(dtype=np.float64) / max(np.square(exact).sum(dtype=np.float64), 1e-300))
        )
    return float(np.mean(ratios))


def _quantized(rows: Floats, known: ChannelStats, scales: Floats) -> Floats:
    """Divided rows as int8 with the one scale gives them back that a tensor calibrated with what is known
    would have.
    """
    histogram = Histogram()
    histogram.add(np.vstack([known.rows, known.largest]), scales**2)
    step = input_step(histogram.range().peak)
    return np.clip(np.rint(rows / step), -INT8_PEAK, INT8_PEAK) * step


def decibel(ratio: float) -> float:
    """How far something is below what it is this share of, in power."""
    return -10 * math.log10(ratio) if ratio > 0 else math.inf


def columns(layer: Layer) -> Floats:
    """COLUMNS columns of a weight, evenly spread, float32 [K, COLUMNS]. Raises SourceError when they are not finite."""
    tensor = tensor_of(layer.weight)
    values, count = tensor.numpy(), layer.matrix[1]
    chosen = np.linspace(0, count - 1, min(COLUMNS, count)).astype(int)
    part = np.array(
        (values[chosen].reshape(len(chosen), -1).T if layer.by_output else values[:, chosen]), np.float32, order="C"
    )
    del values  # what is still seen cannot be released
    release(tensor)
    check(layer.weight.name, part, float(np.finfo(np.float32).max))
    return part


def _row_peaks(group: Sequence[Layer]) -> Floats:
    """The largest magnitude of the weights that multiply each channel, float32 [K]. Raises SourceError when one is not
    finite.
    """
    rows, _ = group[0].matrix
    peaks = np.zeros(rows, np.float32)
    for layer in group:
        tensor = tensor_of(layer.weight)
        values = tensor.numpy()
        for chunk in chunks(*layer.matrix):
            part = (values[chunk].T if layer.transposed else values[:, chunk]).astype(np.float32)
            check(layer.weight.name, part, float(np.finfo(np.float32).max))
            np.maximum(peaks, np.abs(part).max(axis=1), out=peaks)
        del values
        release(tensor)
    return peaks


# Carrying it out.


def _divide(model: ir.Model, site: Site, scales: Floats) -> None:
    """Divide an operand by the scales, which stand at the site's offset."""
    factors = np.ones(site.width, np.float32)
    factors[site.offset : site.offset + len(scales)] = 1 / scales
    if site.layer is not None:
        _scale_matrix(model, site.layer, factors, rows=False)
        return
    source = site.source
    name = next(
        name
        for i in range(len(model.graph.initializers) + 1)
        if (name := f"{source.name}.folded{i or ''}") not in model.graph.initializers
    )
    values = tensor_of(source).numpy().astype(np.float32) * factors
    site.node.replace_input_with(site.index, add_initializer(model, name, ir.tensor(values, name=name)))


def _scale_matrix(model: ir.Model, layer: Layer, factors: Floats, rows: bool) -> None:
    """Multiply a weight's rows (inputs) or columns (outputs), when it is read. It is float32 from then on."""
    weight, source = layer.weight, tensor_of(layer.weight)
    broadcast = factors[None] if rows == layer.transposed else factors[:, None]

    def compute() -> ir.TensorProtocol:
        values = source.numpy().astype(np.float32)
        values *= broadcast
        release(source)
        return ir.tensor(values, name=source.name)

    weight.const_value = ir.LazyTensor(compute, ir.DataType.FLOAT, ir.Shape(layer.stored), name=weight.name)
    weight.type = ir.TensorType(ir.DataType.FLOAT)
    for user, _ in list(weight.uses()):
        if user.op_type == "Cast":
            ir.convenience.replace_all_uses_with(user.outputs[0], weight)
            model.graph.remove(user, safe=True)
