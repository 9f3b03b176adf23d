"""Reads and joins the safetensors files of a folder. It needs nothing but Python and numpy, in a peer's environment.

A file is the length of its header in 8 bytes, the header as JSON with the place of each tensor behind it, and the
tensors (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

LENGTH: Final = 8
TYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "uint16"}


def headers(folder: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Each file, where its tensors begin, and the places of these by name. Raises FileNotFoundError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors files")
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        yield path, LENGTH + length, header


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every floating-point tensor as a numpy array, mapped from its file; bfloat16 as float32."""
    import numpy as np

    for path, begin, header in headers(folder):
        data = np.memmap(path, np.uint8, "r")
        for name, place in header.items():
            if place["dtype"] not in TYPES:
                continue
            start, end = place["data_offsets"]
            values = data[begin + start : begin + end].view(TYPES[place["dtype"]]).reshape(place["shape"])
            if place["dtype"] == "BF16":  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, values


def join(folder: Path, output: Path, renamed: Callable[[str], str] = str) -> None:
    """All files of the folder as one, with tensors renamed."""
    parts = list(headers(folder))
    joined, size = dict[str, Any](), 0
    for path, begin, header in parts:
        for name, place in header.items():
            joined[renamed(name)] = place | {"data_offsets": [size + offset for offset in place["data_offsets"]]}
        size += path.stat().st_size - begin
    text = json.dumps(joined).encode()
    text += b" " * (-len(text) % LENGTH)
    with output.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for path, begin, _ in parts:
            with path.open("rb") as source:
                source.seek(begin)
                shutil.copyfileobj(source, file, 1 << 24)
