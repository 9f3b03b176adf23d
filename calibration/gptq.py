"""GPTQ: int4 weights whose later rows make up for the errors of those that were rounded before.

Rounding leaves an error E of a weight [K, N], and the layer's output over all rows X is off by X E: by tr(E^T H E), H = X^T X. Where
channels are correlated, what one row's error does can be undone by others. With H = L D L^T, L of unit diagonal, the cost is the sum over
k of D_k (E_k + sum over j > k of L_jk E_j)^2: from the last row to the first, each is moved by the errors that are known and then rounded.
That is what Frantar et al. 2022 (arXiv 2210.17323) do, in the form of Chee et al. 2023 (arXiv 2307.13304), which inverts no matrix.
The scales of a block are those of a few tried that leave the least of this cost, which is known once the block is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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

from calibration.codes import CodeWriter, Place
from calibration.equalize import Fold, equalize, folded_scales
from calibration.hessians import Hessian, hessians
from calibration.quantize import Layer, LayerPlan, name_of, tensor_of, weight_layers
from calibration.weights import (
    INT4_LARGEST,
    INT4_PEAK,
    WEIGHTED_SHARES,
    WORKERS,
    Codes,
    Floats,
    check,
    half,
    int4_blocks,
    matrix_columns,
    pack_int4,
    release,
)
from runtime.signature import Array

DAMPING: Final = 0.05
"""Added to the diagonal of H, as a share of its mean: how far the correlations seen are trusted to hold for other rows."""
ENOUGH_ROWS: Final = 4
"""Rows for each channel below which the damping grows, in proportion, up to MOST_DAMPING times."""
MOST_DAMPING: Final = 10
MOST_SNR: Final = 200.0
"""In dB: what is told where there is no error, or nothing to have one."""
COLUMNS: Final = 512
"""Columns of a weight compensated in one step."""
MEASURED: Final = 64
"""Columns of a step whose errors are measured: each costs as much as compensating it."""


@dataclass(frozen=True)
class Compensation:
    """What was made of one weight. `rows` are those its inputs had in all calls; `share` is that of its columns that are compensated.

    `snr_db` is the signal to noise ratio of the layer's output on these rows, `gain_db` how much of it rounding would lack, both over the
    columns that were measured. `reason` says why a weight is only rounded.
    """

    weight: str
    rows: int
    snr_db: float = MOST_SNR
    gain_db: float = 0.0
    share: float = 0.0
    reason: str = ""


class Compensated(NamedTuple):
    """Codes [K, N] in -8..7 and float16 scales [K / block, N], compensated or, unless `chosen`, rounded.

    Of the columns that were measured W^T H W, E^T H E by rounding, and as it is, each summed.
    """

    codes: Codes
    scales: NDArray[np.float16]
    chosen: bool
    signal: float
    rounded: float
    error: float


class Factor(NamedTuple):
    """L [K, K], of unit diagonal, and D [K] of a damped Hessian."""

    lower: Floats
    pivots: Floats


def factor(hessian: Hessian) -> Factor:
    """H / mean(diag H), damped, as L D L^T. Raises LinAlgError, saying why, where that cannot be told from H."""
    mean = float(np.diagonal(hessian.matrix).mean(dtype=np.float64))
    if not mean >= float(np.finfo(np.float32).tiny):
        raise np.linalg.LinAlgError("its inputs were always zero")
    damped = hessian.matrix / np.float32(mean)
    few = ENOUGH_ROWS * len(damped) / max(hessian.rows, 1)
    damped[np.diag_indices_from(damped)] += np.float32(DAMPING * min(max(few, 1), MOST_DAMPING))
    try:
        lower = linalg.cholesky(damped, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise np.linalg.LinAlgError("its inputs are too nearly dependent to be told apart") from None
    roots = np.diagonal(lower).copy()
    lower /= roots
    return Factor(lower, np.square(roots))


def compensated(weights: Floats, hessian: Floats, found: Factor, block: int) -> Compensated:
    """int4 blocks of weights [K, N], compensated where that leaves less error than rounding, on the rows of H and some of the columns."""
    importance = np.diagonal(hessian).copy()
    codes, scales = _compensated(weights, found, block)
    some = np.linspace(0, weights.shape[1] - 1, min(MEASURED, weights.shape[1])).astype(int)
    part = weights[:, some]
    signal, rounded, error = (
        _power(columns, hessian)
        for columns in (
            part,
            _restored(*int4_blocks(part, block, importance), block) - part,
            _restored(codes[:, some], scales[:, some], block) - part,
        )
    )
    if error < rounded:
        return Compensated(codes, scales, True, signal, rounded, error)
    return Compensated(*int4_blocks(weights, block, importance), False, signal, rounded, rounded)


def _restored(codes: Codes, scales: NDArray[np.float16], block: int) -> Floats:
    return np.multiply(codes, np.repeat(scales.astype(np.float32), block, axis=0), dtype=np.float32)


def _power(columns: Floats, hessian: Floats) -> float:
    """The sum of c^T H c over all columns."""
    return float(np.einsum("kn,kn->", columns, hessian @ columns, dtype=np.float64))


def _compensated(weights: Floats, found: Factor, block: int) -> tuple[Codes, NDArray[np.float16]]:
    lower, pivots = found
    codes = np.empty(weights.shape, np.int8)
    errors = np.empty_like(weights)
    scales = np.empty((len(weights) // block, weights.shape[1]), np.float16)
    for start in reversed(range(0, len(weights), block)):
        rows, below = slice(start, start + block), slice(start + block, None)
        shift = lower[below, rows].T @ errors[below]
        levels, scale = _block(weights[rows], shift, lower[rows, rows], pivots[rows])
        codes[rows], scales[start // block] = levels, scale
        errors[rows] = weights[rows] - levels * scale
    return codes, scales


def _block(weights: Floats, shift: Floats, inner: Floats, pivots: Floats) -> tuple[Floats, Floats]:
    """Levels [block, N] and scale [N] of rows that the errors of others move by `shift`."""
    free = weights + np.linalg.solve(inner.T, shift)  # what would leave no error
    peak = np.maximum(free.max(axis=0), -free.min(axis=0)) / np.float32(INT4_PEAK)
    tried = np.stack([half(peak * np.float32(share)) for share in WEIGHTED_SHARES])
    levels, cost = _rounded(weights, shift, inner, pivots, tried)
    best, every = cost.argmin(axis=0), np.arange(weights.shape[1])
    chosen, scale, least = levels[:, best, every], tried[best, every], cost[best, every]
    seen, exact = inner.T @ chosen, inner.T @ free
    power = np.einsum("k,kn,kn->n", pivots, seen, seen)
    fitted = np.einsum("k,kn,kn->n", pivots, seen, exact) / np.where(power > 0, power, 1)
    fitted = half(np.where(fitted > 0, np.minimum(fitted, peak), peak))
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
    model: ir.Model, layers: Sequence[LayerPlan], folds: Sequence[Fold], samples: Sequence[Mapping[str, Array]], output: Path
) -> list[Compensation]:
    """Write codes and scales of every weight that these plans make int4 to `output`, as `read_codes` reads them; what was made of each.

    `model` is the float graph; the weights are those it has once `folds` are carried out. The file appears whole or not at all. Raises
    InvalidInput as `hessians` does, and SourceError for weights that are not finite.
    """
    readers = _readers(equalize(model, folds), layers)
    scales = folded_scales(folds)
    made: list[Compensation] = []
    with CodeWriter(output, [Place(p.weight, *layer.matrix, p.block) for group in readers.values() for layer, p in group]) as writer:
        for tensor, seen in hessians(model, list(readers), samples):
            hessian = seen.divided(scales[tensor]) if tensor in scales else seen
            made += _compensate(readers[tensor], hessian, writer)
        writer.finish([asdict(one) for one in made])
    return made


def _readers(model: ir.Model, layers: Sequence[LayerPlan]) -> dict[str, list[tuple[Layer, LayerPlan]]]:
    """The layers whose weights are int4, by the tensor they read; a weight that several use is the first one's, as `quantize` has it."""
    plans = {planned.node: planned for planned in layers}
    found: dict[str, list[tuple[Layer, LayerPlan]]] = {}
    known = set[tuple[str, int]]()
    for layer in weight_layers(model):
        planned = plans[name_of(layer.node)]
        if planned.weight_type == "int4" and (planned.weight, planned.block) not in known:
            known.add((planned.weight, planned.block))
            found.setdefault(name_of(layer.node.inputs[0]), []).append((layer, planned))
    return found


def _compensate(group: Iterable[tuple[Layer, LayerPlan]], hessian: Hessian, writer: CodeWriter) -> list[Compensation]:
    """Fill in the weights that read one tensor."""
    try:
        found: Factor | str = factor(hessian)
    except np.linalg.LinAlgError as error:
        found = str(error)
    return [_weight(layer, planned, hessian, found, writer) for layer, planned in group]


def _weight(layer: Layer, planned: LayerPlan, hessian: Hessian, found: Factor | str, writer: CodeWriter) -> Compensation:
    tensor, columns = tensor_of(layer.weight), layer.matrix[1]
    fill = partial(_fill, layer, planned, hessian.matrix, found, writer.tensors(planned.weight, planned.block))
    # A thread's products are of one block: too small to be shared among the threads of a BLAS, which would wait for one another.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(WORKERS) as pool:
        starts = range(0, columns, COLUMNS)
        done = list(pool.map(partial(fill, tensor.numpy()), (slice(start, min(start + COLUMNS, columns)) for start in starts)))
    release(tensor)
    if isinstance(found, str):
        return Compensation(planned.weight, hessian.rows, reason=found)
    signal, rounded, error, chosen = (sum(numbers) for numbers in zip(*done, strict=True))
    snr, before = (10 * math.log10(signal / noise) if signal > 0 and noise > 0 else MOST_SNR for noise in (error, rounded))
    reason = "" if chosen else "rounding leaves no more error"
    return Compensation(planned.weight, hessian.rows, snr, snr - before, chosen / columns, reason)


def _fill(
    layer: Layer,
    planned: LayerPlan,
    hessian: Floats,
    found: Factor | str,
    into: tuple[NDArray[np.uint8], NDArray[np.float16]],
    values: NDArray[Any],
    chunk: slice,
) -> tuple[float, float, float, int]:
    """Codes and scales of some columns into place; the signal and errors that `compensated` measured, and how many are compensated."""
    part = matrix_columns(values, layer.transposed, layer.matrix[0], chunk)
    check(planned.weight, part, INT4_LARGEST)
    codes, scales = into
    packed = slice(chunk.start // 2, chunk.stop // 2)
    if isinstance(found, str):
        chosen, scales[:, chunk] = int4_blocks(part, planned.block, np.diagonal(hessian).copy())
        codes[:, packed] = pack_int4(chosen)
        return 0.0, 0.0, 0.0, 0
    made = compensated(part, hessian, found, planned.block)
    codes[:, packed], scales[:, chunk] = pack_int4(made.codes), made.scales
    return made.signal, made.rounded, made.error, part.shape[1] if made.chosen else 0
