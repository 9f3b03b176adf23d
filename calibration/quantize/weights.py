"""Numbers of a quantized weight: codes and scales, computed from the mapped checkpoint a few columns at a time.

Symmetric round to nearest: a weight is about code * scale, |error| <= scale / 2 unless it was clipped on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.ground.machine import threads
from runtime.errors import SourceError

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]

CHUNK: Final = 1 << 18
"""Weight elements quantized in one step: its buffers stay in cache."""
WORKERS: Final = min(8, threads())
"""Threads that quantize. numpy releases the interpreter lock; each thread needs a few megabytes, or some 100 for GPTQ.
"""
INT8_PEAK: Final = 127
INT4_PEAK: Final = 7
INT4_LARGEST: Final = float(np.finfo(np.float16).max) * INT4_PEAK
"""Magnitude above which float16 scales cannot express a weight."""
INT4_SHARES: Final = (1.0, 0.94, 7 / 8, 0.8)
"""int4 scales tried for each block, as shares of its largest magnitude / 7. 7/8 puts a negative extreme on code -8;
less clips outliers.
"""
WEIGHTED_SHARES: Final = (*INT4_SHARES, 0.97, 0.91, 0.84, 0.75, 0.69)
"""Tried where inputs are known to matter unequally: then clipping what few inputs read pays more often. Holds all of
INT4_SHARES.
"""


NESTED_PEAK: Final = 15
"""Largest factor of a block of nested int4: its int8 codes, code * factor, then stay within -120..105."""
NESTED_ROOM: Final = 14
"""Factor of the block that asks for the largest scale of its column: a little room for compensation, which moves
weights.
"""


class Grid(NamedTuple):
    """The values that a code of 4 bits can have, before its block's scale.

    The scale is what puts the largest magnitude of a block on `largest`. `snap` moves values [...] to the nearest of
    them, in place, and `codes` gives the codes of such values, int8.
    """

    largest: float
    snap: Callable[[Floats], object]
    codes: Callable[[Floats], Codes]


def _snap(values: Floats) -> None:
    np.rint(values, out=values)
    np.clip(values, -INT4_PEAK - 1, INT4_PEAK, out=values)


INT4: Final = Grid(INT4_PEAK, _snap, lambda values: values.astype(np.int8))
"""Whole numbers -8..7, which are their own codes."""


class Int4(NamedTuple):
    """A weight [K, N] as int4: codes two in a byte, uint8 [K, N / 2], as `pack_int4` has them, and float16 scales [K /
    block, N].

    Nested in int8, the scales are whole numbers from 1 to NESTED_PEAK, and `base` is the scale of each column, float32
    [N]: code * scale is then an int8 code.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    base: Floats | None = None


Known = Callable[[], Int4]
"""Reads what was computed before, such as by `calibration.quantize.gptq`."""


def int8_columns(weights: Floats) -> tuple[Codes, Floats]:
    """Codes [K, N] in -127..127 and scales [N] of weights [K, N]: one scale a column. A column of zeros has scale 1."""
    scales = _usable(np.abs(weights).max(axis=0) / np.float32(INT8_PEAK))
    return np.rint(weights / scales).astype(np.int8), scales


def int4_blocks(weights: Floats, block: int, importance: Floats | None = None) -> tuple[Codes, NDArray[np.float16]]:
    """Codes [K, N] in -8..7 and scales [K / block, N] of weights [K, N]: of a few scales for each block, the one of
    least squared error.

    With `importance` [K], the mean square of each input, that error is the one expected of the layer's output when
    inputs are uncorrelated, sum of importance * (weight - code * scale)^2; then more scales are tried, the
    least-squares one of the best codes among them. Scales are rounded to float16 before codes are chosen, so the codes
    make up for that rounding. A block of zeros has scale 1.
    """
    codes, scales = blocks_of(weights, block, importance, half)
    return codes, scales.astype(np.float16)


def nested_blocks(
    weights: Floats, block: int, importance: Floats | None = None
) -> tuple[Codes, NDArray[np.float16], Floats]:
    """As `int4_blocks`, with scales that are whole numbers, and the scale of each column that they multiply, as `Int4`
    has them nested.
    """
    base = nested_base(weights, block)
    codes, scales = blocks_of(weights, block, importance, partial(nested, base))
    return codes, np.rint(scales / base).astype(np.float16), base


def nested_base(weights: Floats, block: int) -> Floats:
    """The scale of each column [N] that those of its blocks are multiples of."""
    blocks = weights.reshape(-1, block, weights.shape[1])
    return _usable(_peaks(blocks, INT4).max(axis=0) / np.float32(NESTED_ROOM))


def nested(base: Floats, scales: Floats) -> Floats:
    """The nearest scales [..., N] that are multiples of those of their columns, up to NESTED_PEAK times."""
    return np.clip(np.rint(scales / base), 1, NESTED_PEAK) * base


def _peaks(blocks: Floats, grid: Grid) -> Floats:
    """The scales [K / block, N] that put the largest magnitude of blocks [K / block, block, N] on the last code."""
    return np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(grid.largest)


def blocks_of(
    weights: Floats, block: int, importance: Floats | None, snapped: Callable[[Floats], Floats], grid: Grid = INT4
) -> tuple[Codes, Floats]:
    """Codes and scales of blocks; `snapped` gives the scales that can be stored next to others."""
    blocks = weights.reshape(-1, block, weights.shape[1])
    peak = _peaks(blocks, grid)
    best = np.full(peak.shape, np.inf, np.float32)
    scales = np.ones(peak.shape, np.float32)
    levels = np.empty_like(blocks)
    weighting = None if importance is None else _relative(importance).reshape(-1, block)

    def attempt(scale: Floats) -> None:
        _levels(blocks, scale, grid, levels)
        np.multiply(levels, scale[:, None], out=levels)
        np.subtract(levels, blocks, out=levels)
        if weighting is None:
            error = np.einsum("ijk,ijk->ik", levels, levels)
        else:
            error = np.einsum("ij,ijk->ik", weighting, np.square(levels, out=levels))
        better = error < best
        best[better], scales[better] = error[better], scale[better]

    for share in INT4_SHARES if weighting is None else WEIGHTED_SHARES:
        attempt(snapped(peak * np.float32(share)))
    _levels(blocks, scales, grid, levels)
    if weighting is not None:
        fitted = np.einsum("ij,ijk,ijk->ik", weighting, levels, blocks) / _usable(
            np.einsum("ij,ijk,ijk->ik", weighting, levels, levels)
        )
        attempt(snapped(np.where(fitted > 0, np.minimum(fitted, peak), peak)))
        _levels(blocks, scales, grid, levels)
    return grid.codes(levels.reshape(weights.shape)), scales


def _relative(importance: Floats) -> Floats:
    """Shares of the mean, an input that is always zero counting a millionth of it: its weights still get the scale they
    ask for.

    Uniform where nothing was ever seen.
    """
    mean = float(importance.mean(dtype=np.float64))
    if mean < np.finfo(np.float32).tiny:
        return np.ones(importance.shape, np.float32)
    return np.maximum(importance / np.float32(mean), np.float32(1e-6))


def half(scales: Floats) -> Floats:
    """Scales that float16 can hold, as float32."""
    return _usable(scales.astype(np.float16).astype(np.float32))


def _levels(blocks: Floats, scale: Floats, grid: Grid, out: Floats) -> None:
    np.multiply(blocks, np.reciprocal(scale)[:, None], out=out)
    grid.snap(out)


def _usable(scales: Floats) -> Floats:
    """Zero is no scale for TensorRT, and its reciprocal none for us: where all weights round to zero any
    scale will do.
    """
    scales[scales < np.finfo(np.float32).tiny] = 1
    return scales


def unpack_int4(packed: NDArray[np.uint8]) -> Codes:
    """What `pack_int4` packed."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    np.left_shift(packed.view(np.int8), 4, out=codes[..., 0::2])
    codes[..., 0::2] >>= 4
    np.right_shift(packed.view(np.int8), 4, out=codes[..., 1::2])
    return codes


def pack_int4(codes: Codes) -> NDArray[np.uint8]:
    """Neighbours of the last axis (even length) in one byte, the first in its low half: the layout of ONNX and of
    numpy's row order.
    """
    nibbles = codes.view(np.uint8) & 0xF
    return np.bitwise_or(nibbles[..., 0::2], np.left_shift(nibbles[..., 1::2], 4, dtype=np.uint8))


class QuantizedWeight:
    """A weight seen as a matrix [K, N], and its quantized tensors, each computed when it is first read.

    `source` is stored as [N, K, ...] when `transposed`, else as [K, N]. `block` is that of int4, 0 for int8;
    `importance` is that of int4_blocks. With `known`, int4 is what that gives, and the source is not read. Asking for
    the codes leaves the scales behind for the next who asks, so that writing a graph quantizes each weight once. Raises
    SourceError for weights that are not finite.
    """

    dtype: ClassVar[Any] = np.int8
    """Of codes that are not packed."""
    packed: ClassVar[ir.DataType] = ir.DataType.INT4
    """Of codes that are."""
    largest: ClassVar[float] = INT4_LARGEST
    """Magnitude above which the scales of packed codes cannot express a weight."""

    def __init__(
        self,
        source: ir.TensorProtocol,
        transposed: bool,
        block: int = 0,
        importance: Floats | None = None,
        known: Known | None = None,
    ) -> None:
        self.source, self.transposed, self.block, self.importance, self.known = (
            source,
            transposed,
            block,
            importance,
            known,
        )
        shape = tuple(source.shape.numpy())
        self.rows, self.columns = (math.prod(shape[1:]), shape[0]) if transposed else shape
        self._scales: NDArray[Any] | None = None

    def codes(self) -> ir.TensorProtocol:
        """int8 or packed [K, N]."""
        codes = self._quantize()
        if self.block:
            return ir.PackedTensor(codes.reshape(-1), self.packed, shape=(self.rows, self.columns))
        return ir.tensor(codes)

    def kernel(self) -> ir.TensorProtocol:
        """Codes in the stored order, as convolutions take them."""
        return ir.tensor(np.ascontiguousarray(self._quantize().T).reshape(tuple(self.source.shape.numpy())))

    def scales(self) -> ir.TensorProtocol:
        """float32 [N] of int8, float16 [K / block, N] of int4."""
        if self._scales is None:
            self._quantize()
        scales, self._scales = self._scales, None
        assert scales is not None
        return ir.tensor(scales)

    def _quantize(self) -> NDArray[Any]:
        """Codes [K, N], or [K, N / 2] of packed int4."""
        if self.block and self.known is not None:
            codes, self._scales, _ = self.known()
            return codes
        codes, scales = self._empty()
        with ThreadPoolExecutor(WORKERS) as pool:
            for _ in pool.map(partial(self._fill, self.source.numpy(), codes, scales), chunks(self.rows, self.columns)):
                pass  # raises what a worker raised
        release(self.source)
        self._scales = scales
        return codes

    def _fill(self, values: NDArray[Any], codes: NDArray[Any], scales: NDArray[Any], chunk: slice) -> None:
        """Quantize the columns of one chunk into place."""
        part = matrix_columns(values, self.transposed, self.rows, chunk)
        check(self.source.name, part, self.largest if self.block else float(np.finfo(np.float32).max))
        if self.block:
            chosen, scales[:, chunk] = self._blocks(part, chunk)
            codes[:, chunk.start // 2 : chunk.stop // 2] = pack_int4(chosen)
        else:
            codes[:, chunk], scales[chunk] = self._columns(part)

    def _blocks(self, part: Floats, chunk: slice) -> tuple[Codes, NDArray[np.float16]]:
        """Codes of 4 bits and scales of the columns of one chunk."""
        return int4_blocks(part, self.block, self.importance)

    def _empty(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Room for codes and scales."""
        if self.block:
            return np.empty((self.rows, self.columns // 2), np.uint8), np.empty(
                (self.rows // self.block, self.columns), np.float16
            )
        return np.empty((self.rows, self.columns), self.dtype), np.empty(self.columns, np.float32)

    def _columns(self, part: Floats) -> tuple[NDArray[Any], Floats]:
        """Codes and scales of columns that have one scale each."""
        return int8_columns(part)


def matrix_columns(values: NDArray[Any], transposed: bool, rows: int, chunk: slice) -> Floats:
    """Columns of a weight as float32 [rows, C], from [N, rows, ...] when `transposed`, else from [rows, N]."""
    if transposed:
        return np.ascontiguousarray(values[chunk].reshape(-1, rows).astype(np.float32).T)
    return values[:, chunk].astype(np.float32)


def check(name: str | None, part: Floats, limit: float) -> None:
    """Raise SourceError, naming the weight, when a part of it exceeds the limit or is not finite."""
    if not np.abs(part).max(initial=0) <= limit:
        raise SourceError(
            f"weight '{name}' holds NaN, infinity or a magnitude above {limit:.3g}, which cannot be quantized: "
            "the checkpoint is damaged or overflowed when it was saved. Download it again or build with --quant none"
        )


def release(tensor: ir.TensorProtocol) -> None:
    """Drop a mapping once read: else every weight would keep one of its whole file."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Column ranges of about CHUNK elements, each but the last a whole number of vector registers wide."""
    width = max(16, CHUNK // rows // 16 * 16)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


class NestedWeight(QuantizedWeight):
    """A weight as int4 nested in int8. `by_output` has codes and factors with the output channels first, as
    convolutions have them.
    """

    def __init__(
        self,
        source: ir.TensorProtocol,
        transposed: bool,
        block: int,
        by_output: bool,
        importance: Floats | None = None,
        known: Known | None = None,
    ) -> None:
        super().__init__(source, transposed, block, importance, known)
        self.by_output = by_output
        self._base: Floats | None = None

    def codes(self) -> ir.TensorProtocol:
        """int4 [K, N], or [N, K] by output."""
        codes = self._quantize()
        shape = (self.rows, self.columns)
        if self.by_output:
            codes, shape = pack_int4(np.ascontiguousarray(unpack_int4(codes).T)), shape[::-1]
        return ir.PackedTensor(codes.reshape(-1), ir.DataType.INT4, shape=shape)

    def scales(self) -> ir.TensorProtocol:
        """Factors, uint8 [K / block, N], or [N, K / block] by output."""
        factors = super().scales().numpy().astype(np.uint8)
        return ir.tensor(np.ascontiguousarray(factors.T) if self.by_output else factors)

    def base(self) -> ir.TensorProtocol:
        """float32 [N]."""
        if self._base is None:
            self._quantize()
        base, self._base = self._base, None
        assert base is not None
        return ir.tensor(base)

    def _quantize(self) -> NDArray[Any]:
        if self.known is not None:
            codes, self._scales, self._base = self.known()
            return codes
        self._base = np.empty(self.columns, np.float32)
        return super()._quantize()

    def _blocks(self, part: Floats, chunk: slice) -> tuple[Codes, NDArray[np.float16]]:
        assert self._base is not None
        codes, scales, self._base[chunk] = nested_blocks(part, self.block, self.importance)
        return codes, scales
