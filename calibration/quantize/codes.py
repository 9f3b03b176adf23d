"""int4 codes and scales of many weights in one safetensors file, written one weight at a time: none but the one at work
is in memory.

Tensors are named `weight/form/codes` and the like, as `calibration.quantize.weights.Int4` has them. The form is the
block, with an `n` where nested. The header's metadata say how they came about.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from calibration.quantize.weights import Int4, Known
from runtime.errors import SourceError

METADATA: Final = "enginecast_codes"
RECORD_BYTES: Final = 512
"""Room for what is said of one weight, besides its name, in the header: that is written last, before the tensors."""
DTYPES: Final = {"codes": ("U8", np.uint8), "scales": ("F16", np.float16), "base": ("F32", np.float32)}
Key = tuple[str, int, bool]
"""A weight, the number of its rows that share a scale, and whether it is nested."""


class Place(NamedTuple):
    """A weight [rows, columns] and its form: the number of its rows that share a scale, and whether it is nested."""

    weight: str
    rows: int
    columns: int
    block: int
    nested: bool = False

    @property
    def key(self) -> Key:
        return self.weight, self.block, self.nested

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {
            "codes": (self.rows, self.columns // 2),
            "scales": (self.rows // self.block, self.columns),
        }
        return found | {"base": (self.columns,)} if self.nested else found


class CodeWriter:
    """Writes a file that appears at `path`, whole, when `finish` is called. Weights may be filled in any order."""

    def __init__(self, path: Path, places: Sequence[Place]) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._entries: dict[str, dict[str, Any]] = {}
        end = 0
        for place in places:
            for kind, shape in place.shapes.items():
                start, end = end, end + int(np.prod(shape)) * np.dtype(DTYPES[kind][1]).itemsize
                name = _name(place.key, kind)
                self._entries[name] = {"dtype": DTYPES[kind][0], "shape": shape, "data_offsets": (start, end)}
        room = sum(RECORD_BYTES + 2 * len(place.weight.encode()) for place in places)
        self._head = -(-(8 + len(self._header([])) + room) // 64) * 64
        with self._part.open("wb") as file:
            file.truncate(self._head + end)

    def __enter__(self) -> CodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(FileNotFoundError):
            self._part.unlink()

    def tensors(self, key: Key) -> Int4:
        """Codes and scales of one weight, mapped, to be filled in place."""
        return Int4(*(self._mapped(_name(key, kind), kind) for kind in _kinds(key)))

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add what is said of the weights, and let the file appear."""
        header = self._header(records).ljust(self._head - 8)
        assert len(header) == self._head - 8, "there is room for one short record a weight"
        with self._part.open("r+b") as file:
            file.write(len(header).to_bytes(8, "little") + header)
        self._part.replace(self._path)

    def _header(self, records: Sequence[Mapping[str, Any]]) -> bytes:
        return json.dumps({"__metadata__": {METADATA: json.dumps(list(records))}} | self._entries).encode()

    def _mapped(self, name: str, kind: str) -> NDArray[Any]:
        entry = self._entries[name]
        return np.memmap(self._part, DTYPES[kind][1], "r+", self._head + entry["data_offsets"][0], entry["shape"])


def read_codes(path: Path) -> dict[Key, Known]:
    """What reads each weight, by its name and form. Raises SourceError for a file that is damaged or something else."""
    with _opened(path) as file:
        names = [name.rsplit("/", 2) for name in list(file.keys())]
    keys: list[Key] = [
        (weight, int(form.rstrip("n")), form.endswith("n")) for weight, form, kind in names if kind == "codes"
    ]
    return {key: partial(_read, path, key) for key in keys}


def read_records(path: Path) -> list[dict[str, Any]]:
    """What is said of the weights. Raises SourceError for a file that is damaged or something else."""
    with _opened(path) as file:
        found: list[dict[str, Any]] = json.loads(file.metadata()[METADATA])
        return found


def _read(path: Path, key: Key) -> Int4:
    with _opened(path) as file:
        return Int4(*(file.get_tensor(_name(key, kind)) for kind in _kinds(key)))


def _opened(path: Path) -> Any:
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} cannot be read as int4 codes ({error}): delete it and build again") from None
    if METADATA not in (file.metadata() or {}):
        raise SourceError(
            f"{path} holds no int4 codes, expected a file that `compensate` wrote: delete it and build again"
        )
    return file


def _kinds(key: Key) -> list[str]:
    return [kind for kind in DTYPES if key[2] or kind != "base"]


def _name(key: Key, kind: str) -> str:
    weight, block, nested = key
    return f"{weight}/{block}{'n' * nested}/{kind}"
