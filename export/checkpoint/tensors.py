"""Weights as byte ranges of safetensors files: a strict reader of the file's header, views on a memory map, a scan for
NaN.

Format: https://github.com/huggingface/safetensors#format. A file is eight bytes (little-endian length of the header),
the header (JSON: tensor name -> dtype, shape, data_offsets), then the bytes of all tensors, back to back. The
safetensors library does not report offsets, which weightless export needs: the ONNX initializers point at these ranges.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from calibration.ground.progress import reached
from runtime.errors import NotFound, SourceError, quoted
from runtime.files import open_regular, other_content

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""numpy dtype (ml_dtypes where numpy has none) of each dtype of the format. Little endian, as is every machine we run
on.
"""

EXPONENTS: Final[Mapping[str, int]] = {
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
}
"""The bits that are all set in NaN and infinity and in nothing else (F8_E4M3 has only NaN)."""

PREFIX: Final = 8
MAX_HEADER: Final = 1 << 25
"""Bytes. The library's own limit is three times that; headers of 100,000 tensors have some 12 MB."""
MAX_NUMBER: Final = 1 << 63
MAX_RANK: Final = 64
"""Bounds of a header's numbers: beyond them there is no file."""

CHUNK: Final = 1 << 20
"""Elements looked at in one step of the scan: small enough to stay in cache."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a byte range: `nbytes` bytes at `offset` (from the start) of the safetensors `file`, row-major."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def array(self) -> NDArray[Any]:
        """A read-only view of the file's memory map: no copy; pages are read when touched and belong to the
        page cache.
        """
        now = self.file.stat()
        return np.ndarray(
            self.shape, DTYPES[self.dtype], _memory(self.file, now.st_ino, now.st_size, now.st_mtime_ns), self.offset
        )


def release() -> None:
    """Forget the cached memory maps. Each is unmapped as soon as no array views it any more."""
    _memory.cache_clear()


@lru_cache(maxsize=256)
def _memory(file: Path, inode: int, size: int, changed: int) -> mmap.mmap:
    """One map for a file as it is now: one that was written again gets a new map."""
    with open_regular(file) as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def read_header(file: Path) -> tuple[bytes, dict[str, TensorRef]]:
    """The header's bytes and, by name in file order, every tensor of a safetensors file. No tensor data is read.

    Raises NotFound when there is no such file and SourceError when it is truncated or breaks the format.
    """
    if not file.is_file():
        raise NotFound(f"weight file {file} does not exist: download the checkpoint again, with all its files")
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        prefix = opened.read(PREFIX)
        if len(prefix) < PREFIX:
            raise SourceError(f"{file} is no safetensors file: it has {size} bytes. {_AGAIN}")
        (length,) = struct.unpack("<Q", prefix)
        beginning = opened.read(64)
        if not beginning.startswith(b"{") and (other := other_content(prefix + beginning)):
            raise SourceError(f"{file} {other}")
        opened.seek(PREFIX)
        if length > MAX_HEADER:
            raise SourceError(
                f"{file} is no safetensors file: its header would have {length} bytes, at most {MAX_HEADER} are allowed"
            )
        if length > size - PREFIX:
            raise SourceError(
                f"{file} is truncated: its header has {length} bytes, {size - PREFIX} are there. {_AGAIN}"
            )
        header = opened.read(length)
    return header, _parse(file, header, size)


_AGAIN: Final = "Download it again"


def _parse(file: Path, header: bytes, size: int) -> dict[str, TensorRef]:
    start = PREFIX + len(header)
    refs: dict[str, TensorRef] = {}
    for name, entry in _entries(file, header).items():
        if name != "__metadata__":
            refs[name] = _ref(file, name, entry, start)
    refs = dict(sorted(refs.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, ref in refs.items():
        if ref.offset != end:
            raise SourceError(
                f"{file}: tensor {quoted(name)} starts at byte {ref.offset}, expected {end}: tensors overlap or leave "
                f"a hole. {_AGAIN}"
            )
        end += ref.nbytes
    if end != size:
        what = "truncated" if size < end else "damaged"
        raise SourceError(f"{file} is {what}: expected {end} bytes, found {size}. {_AGAIN}")
    return refs


def _entries(file: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} has a damaged header, expected JSON: {error}. {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise SourceError(
            f"{file} has a damaged header: expected a JSON object, found {type(entries).__name__}. {_AGAIN}"
        )
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _ref(file: Path, name: str, entry: object, start: int) -> TensorRef:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if len(
            shape
        ) <= MAX_RANK and _naturals([*shape, begin, end]):
            pass
        case _:
            raise SourceError(
                f"{file}: tensor {quoted(name)} is described as {str(entry)[:200]}, expected dtype, shape and "
                f"data_offsets. {_AGAIN}"
            )
    if dtype not in DTYPES:
        raise SourceError(
            f"{file}: tensor {quoted(name)} has dtype {quoted(dtype)}, known are {', '.join(DTYPES)}: publish the "
            "checkpoint in one of them"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise SourceError(
            f"{file}: tensor {quoted(name)} of {dtype} {shape} needs {nbytes} bytes, its range {begin}:{end} has "
            f"{end - begin}. {_AGAIN}"
        )
    return TensorRef(file, start + begin, nbytes, dtype, tuple(shape))


def _naturals(values: list[object]) -> bool:
    return all(type(value) is int and 0 <= value < MAX_NUMBER for value in values)


def check_finite(tensors: Mapping[str, TensorRef]) -> None:
    """Look for NaN and infinity in every floating-point tensor, in chunks, over the memory map: a few MB of memory at
    any size.

    Raises SourceError naming file, tensor and index of the first such value.
    """
    total, done = sum(ref.nbytes for ref in tensors.values()) or 1, 0
    for name, ref in tensors.items():
        reached(done / total, f"{done / 1e9:.1f} of {total / 1e9:.1f} GB")
        if ref.dtype in EXPONENTS:
            _check_tensor(name, ref)
        done += ref.nbytes


def _check_tensor(name: str, ref: TensorRef) -> None:
    bits = ref.array().reshape(-1).view(f"u{DTYPES[ref.dtype].itemsize}")
    mask = bits.dtype.type(EXPONENTS[ref.dtype])
    masked = np.empty(min(bits.size, CHUNK), bits.dtype)
    for first in range(0, bits.size, CHUNK):
        chunk = bits[first : first + CHUNK]
        exponents = np.bitwise_and(chunk, mask, out=masked[: chunk.size])
        # An integer maximum is several times faster than isfinite, which has no vector form for half precision.
        if exponents.max() == mask:
            index = np.unravel_index(first + int(exponents.argmax()), ref.shape)
            place = [int(axis) for axis in index]
            raise SourceError(
                f"{ref.file}: tensor {quoted(name)} holds {ref.array()[index]} at {place}, expected finite weights: "
                "the checkpoint is "
                "damaged, or overflowed when it was saved in half precision. Download it again or take its float32 "
                "weights"
            )
