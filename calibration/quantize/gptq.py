"""GPTQ: int4 weights whose later rows make up for the errors of those that were rounded before.

Rounding leaves an error E of a weight [K, N], and the layer's output over all rows X is off by X E: by tr(E^T H E), H =
X^T X. Where channels are correlated, what one row's error does can be undone by others. With H = L D L^T, L of unit
diagonal, the cost is the sum over k of D_k (E_k + sum over j > k of L_jk E_j)^2: from the last row to the first, each
is moved by the errors that are known and then rounded. That is what Frantar et al. 2022 (arXiv 2210.17323) do, in the
form of Chee et al. 2023 (arXiv 2307.13304), which inverts no matrix. The scales of a block are those of a few tried
that leave the least of this cost, which is known once the block is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy import linalg
from threadpoolctl import threadpool_limits

from calibration.observe.hessians import Hessian, hessians
from calibration.observe.windows import add_windows
from calibration.quantize.codes import CodeWriter, Place
from calibration.quantize.equalize import Fold, equalize, folded_scales
from calibration.quantize.layers import Layer, name_of, tensor_of, weight_layers
from calibration.quantize.plan import LayerPlan
from calibration.quantize.weights import (
    INT4_LARGEST,
    INT4_PEAK,
    WEIGHTED_SHARES,
    WORKERS,
    Codes,
    Floats,
    Int4,
    blocks_of,
    check,
    half,
    matrix_columns,
    nested,
    nested_base,
    pack_int4,
    release,
)
from runtime.bundle.signature import Array

DAMPING: Final = 0.05
"""Added to the diagonal of H, as a share of its mean: how far the correlations seen are trusted to hold for other rows.
"""
ENOUGH_ROWS: Final = 4
"""Rows for each channel below which the damping grows, in proportion, up to MOST_DAMPING times."""
MOST_DAMPING: Final = 10
MOST_SNR: Final = 200.0
"""In dB: the reported ratio where there is no error, or no signal."""
COLUMNS: Final = 512
"""Columns of a weight compensated in one step."""
MEASURED: Final = 64
"""Columns of a step whose errors are measured: each costs as much as compensating it."""


@dataclass(frozen=True)
class Compensation:
    """What was made of one weight. `rows` are those its inputs had in all calls; `share` is that of its columns that
    are compensated.

    `snr_db` is the signal to noise ratio of the layer's output on these rows, `gain_db` how much of it rounding would
    lack, both over the columns that were measured. `reason` says why a weight is only rounded.
    """

    weight: str
    rows: int
    snr_db: float = MOST_SNR
    gain_db: float = 0.0
    share: float = 0.0
    reason: str = ""


class Compensated(NamedTuple):
    """Codes [K, N] in -8..7 and scales [K / block, N] that can be stored, compensated or, unless `chosen`, rounded.

    Of the columns that were measured W^T H W, E^T H E by rounding, and as it is, each summed.
    """

    codes: Codes
    scales: Floats
    chosen: bool
    signal: float
    rounded: float
    error: float


class Factor(NamedTuple):
    """L [K, K], of unit diagonal, and D [K] of a damped Hessian."""

    lower: Floats
    pivots: Floats


def factor(hessian: Hessian) -> Factor:
    """H / mean(diag H), damped, as L D L^T. Raises LinAlgError with the reason where H has no such form."""
    mean = float(np.diagonal(hessian.matrix).mean(dtype=np.float64))
    if not mean >= float(np.finfo(np.float32).tiny):
        raise np.linalg.LinAlgError("its inputs were always zero")
    damped = hessian.matrix / np.float32(mean)
    few = ENOUGH_ROWS * len(damped) / max(hessian.rows, 1)
    damped[np.diag_indices_from(damped)] += np.float32(DAMPING * min(max(few, 1), MOST_DAMPING))
    try:
        lower = linalg.cholesky(damped, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise np.linalg.LinAlgError("its inputs are too nearly linearly dependent") from None
    roots = np.diagonal(lower).copy()
    lower /= roots
    return Factor(lower, np.square(roots))


def compensated(weights: Floats, hessian: Floats, found: Factor, block: int, base: Floats | None = None) -> Compensated:
    """int4 blocks of weights [K, N], compensated where that leaves less error than rounding, on the rows of H and some
    of the columns.

    With `base` [N] they are nested: scales are multiples of it.
    """
    importance = np.diagonal(hessian).copy()
    codes, scales = _compensated(weights, found, block, half if base is None else partial(nested, base))
    some = np.linspace(0, weights.shape[1] - 1, min(MEASURED, weights.shape[1])).astype(int)
    part = weights[:, some]
    signal, rounded, error = (
        _power(columns, hessian)
        for columns in (
            part,
            _restored(*_plain(part, block, importance, None if base is None else base[some]), block) - part,
            _restored(codes[:, some], scales[:, some], block) - part,
        )
    )
    if error < rounded:
        return Compensated(codes, scales, True, signal, rounded, error)
    return Compensated(*_plain(weights, block, importance, base), False, signal, rounded, rounded)


def _plain(weights: Floats, block: int, importance: Floats, base: Floats | None) -> tuple[Codes, Floats]:
    """Rounded by importance."""
    return blocks_of(weights, block, importance, half if base is None else partial(nested, base))


def _restored(codes: Codes, scales: Floats, block: int) -> Floats:
    return np.multiply(codes, np.repeat(scales, block, axis=0), dtype=np.float32)


def _power(columns: Floats, hessian: Floats) -> float:
    """The sum of c^T H c over all columns."""
    return float(np.einsum("kn,kn->", columns, hessian @ columns, dtype=np.float64))


Snap = Callable[[Floats], Floats]
"""Gives the scales [..., N] that can be stored next to others."""


def _compensated(weights: Floats, found: Factor, block: int, snap: Snap) -> tuple[Codes, Floats]:
    lower, pivots = found
    codes = np.empty(weights.shape, np.int8)
    errors = np.empty_like(weights)
    scales = np.empty((len(weights) // block, weights.shape[1]), np.float32)
    for start in reversed(range(0, len(weights), block)):
        rows, below = slice(start, start + block), slice(start + block, None)
        shift = lower[below, rows].T @ errors[below]
        levels, scale = _block(weights[rows], shift, lower[rows, rows], pivots[rows], snap)
        codes[rows], scales[start // block] = levels, scale
        errors[rows] = weights[rows] - levels * scale
    return codes, scales


def _block(weights: Floats, shift: Floats, inner: Floats, pivots: Floats, snap: Snap) -> tuple[Floats, Floats]:
    """Levels [block, N] and scale [N] of rows that the errors of others move by `shift`."""
    free = weights + np.linalg.solve(inner.T, shift)  # what would leave no error
    peak = np.maximum(free.max(axis=0), -free.min(axis=0)) / np.float32(INT4_PEAK)
    tried = np.stack([snap(peak * np.float32(share)) for share in WEIGHTED_SHARES])
    levels, cost = _rounded(weights, shift, inner, pivots, tried)
    best, every = cost.argmin(axis=0), np.arange(weights.shape[1])
    chosen, scale, least = levels[:, best, every], tried[best, every], cost[best, every]
    seen, exact = inner.T @ chosen, inner.T @ free
    power = np.einsum("k,kn,kn->n", pivots, seen, seen)
    fitted = np.einsum("k,kn,kn->n", pivots, seen, exact) / np.where(power > 0, power, 1)
    fitted = snap(np.where(fitted > 0, np.minimum(fitted, peak), peak))
    levels, cost = _rounded(weights, shift, inner, pivots, fitted[None])
    better = cost[0] < least
    return np.where(better, levels[:, 0], chosen), np.where(better, fitted, scale)


def _rounded(weights: Floats, shift: Floats, inner: Floats, pivots: Floats, scales: Floats) -> tuple[Floats, Floats]:
    """Levels [block, C, N] and cost [C, N] of rows rounded with scales [C, N], the last row first."""
    count = len(weights)
    levels = np.empty((count, *scales.shape), np.float32)
    errors = np.empty_like(levels)
    flat = errors.reshape(count, -1)
    cost = np.zeros_like(scales)
    fine = np.reciprocal(scales)
    for row in reversed(range(count)):
        moved = weights[row] + shift[row] + (inner[row + 1 :, row] @ flat[row + 1 :]).reshape(scales.shape)
        np.multiply(moved, fine, out=levels[row])
        np.rint(levels[row], out=levels[row])
        np.clip(levels[row], -INT4_PEAK - 1, INT4_PEAK, out=levels[row])
        np.multiply(levels[row], scales, out=errors[row])
        cost += pivots[row] * np.square(moved - errors[row])
        np.subtract(weights[row], errors[row], out=errors[row])
    return levels, cost


# All weights of a graph.


def compensate(
    model: ir.Model,
    layers: Sequence[LayerPlan],
    folds: Sequence[Fold],
    samples: Sequence[Mapping[str, Array]],
    output: Path,
) -> list[Compensation]:
    """Write codes and scales of every weight that these plans make int4 to `output`, as `read_codes` reads them; what
    was made of each.

    `model` is the float graph; the weights are those it has once `folds` are carried out. The file appears whole or not
    at all. Raises InvalidInput as `hessians` does, and SourceError for weights that are not finite.
    """
    watched = model.clone()
    readers = _readers(equalize(model, folds), watched, layers)
    scales = folded_scales(folds)
    places = {_place(one): None for group in readers.values() for one in group}
    made: dict[str, _Made] = {}
    with CodeWriter(output, list(places)) as writer:
        for tensor, seen in hessians(watched, list(readers), samples):
            hessian = seen.divided(scales[tensor]) if tensor in scales else seen
            try:
                found: Factor | str = factor(hessian)
            except np.linalg.LinAlgError as error:
                found = str(error)
            for one in readers[tensor]:
                made.setdefault(one.planned.weight, _Made()).add(
                    _weight(one, hessian, found, writer), hessian.rows, found
                )
        results = [one.compensation(weight) for weight, one in made.items()]
        writer.finish([asdict(one) for one in results])
    return results


class _Reader(NamedTuple):
    """A layer with an int4 weight, and the rows of that weight that one tensor is multiplied by: all, or a part of a
    convolution's.
    """

    layer: Layer
    planned: LayerPlan
    rows: slice


@dataclass
class _Made:
    """What was made of the parts of a weight so far."""

    rows: int = 0
    signal: float = 0.0
    rounded: float = 0.0
    error: float = 0.0
    chosen: int = 0
    columns: int = 0
    reason: str = ""

    def add(self, done: Sequence[tuple[float, float, float, int, int]], rows: int, found: Factor | str) -> None:
        self.rows, self.reason = rows, found if isinstance(found, str) else self.reason
        for signal, rounded, error, chosen, columns in done:
            self.signal, self.rounded, self.error = self.signal + signal, self.rounded + rounded, self.error + error
            self.chosen, self.columns = self.chosen + chosen, self.columns + columns

    def compensation(self, weight: str) -> Compensation:
        snr, before = (
            10 * math.log10(self.signal / noise) if self.signal > 0 and noise > 0 else MOST_SNR
            for noise in (self.error, self.rounded)
        )
        reason = self.reason or ("" if self.chosen else "rounding leaves no more error")
        return Compensation(weight, self.rows, snr, snr - before, self.chosen / self.columns, reason)


def _readers(model: ir.Model, watched: ir.Model, layers: Sequence[LayerPlan]) -> dict[str, list[_Reader]]:
    """The layers of `model` whose weights are int4, by the tensor of `watched` they read; a weight that several use is
    the first one's.

    Windows of convolutions are added to `watched`, which is the same graph with its weights as they were.
    """
    plans = {planned.node: planned for planned in layers}
    found: dict[str, list[_Reader]] = {}
    known = set[tuple[str, int, bool]]()
    for layer, same in zip(weight_layers(model), weight_layers(watched), strict=True):
        planned = plans[name_of(layer.node)]
        if planned.weight_type != "int4" or planned.key in known:
            continue
        known.add(planned.key)
        read = [(name_of(layer.node.inputs[0]), slice(0, layer.matrix[0]))]
        for tensor, rows in add_windows(watched, same, planned.block) if planned.op == "Conv" else read:
            found.setdefault(tensor, []).append(_Reader(layer, planned, rows))
    return found


def _place(one: _Reader) -> Place:
    return Place(one.planned.weight, *one.layer.matrix, one.planned.block, one.planned.nested)


def _weight(
    one: _Reader, hessian: Hessian, found: Factor | str, writer: CodeWriter
) -> list[tuple[float, float, float, int, int]]:
    """Fill in a weight, or a part; the signal and errors that `compensated` measured, and how many columns are
    compensated, of how many.
    """
    tensor, columns = tensor_of(one.layer.weight), one.layer.matrix[1]
    fill = partial(_fill, one, hessian.matrix, found, writer.tensors(one.planned.key), tensor.numpy())
    # A thread's products are of one block: too small to be shared among the threads of a BLAS, which would wait for one
    # another.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(WORKERS) as pool:
        starts = range(0, columns, COLUMNS)
        done = list(pool.map(fill, (slice(start, min(start + COLUMNS, columns)) for start in starts)))
    del fill
    release(tensor)
    return done


def _fill(
    one: _Reader, hessian: Floats, found: Factor | str, into: Int4, values: NDArray[Any], chunk: slice
) -> tuple[float, float, float, int, int]:
    """Codes and scales of some columns into place."""
    planned = one.planned
    whole = matrix_columns(values, one.layer.by_output, one.layer.matrix[0], chunk)
    check(planned.weight, whole, INT4_LARGEST)
    base = nested_base(whole, planned.block) if planned.nested else None
    part, blocks = whole[one.rows], slice(one.rows.start // planned.block, one.rows.stop // planned.block)
    if isinstance(found, str):
        codes, scales = _plain(part, planned.block, np.diagonal(hessian).copy(), base)
        figures = 0.0, 0.0, 0.0, 0, part.shape[1]
    else:
        made = compensated(part, hessian, found, planned.block, base)
        codes, scales = made.codes, made.scales
        figures = made.signal, made.rounded, made.error, part.shape[1] if made.chosen else 0, part.shape[1]
    into.codes[one.rows, chunk.start // 2 : chunk.stop // 2] = pack_int4(codes)
    if base is None:
        into.scales[blocks, chunk] = scales
    else:
        assert into.base is not None
        into.scales[blocks, chunk], into.base[chunk] = np.rint(scales / base), base
    return figures
