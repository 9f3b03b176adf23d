"""Tensors in safetensors files, read without the library: bundles are loaded where nothing but numpy is installed.

Format: https://github.com/huggingface/safetensors#format. `read_tensor` gives a tensor of the checkpoint that a
pipeline needs itself, such as the learned queries of a BLIP-2; a family declares them in `Component.tensors`, and the
build writes all of them into one file, as float32.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError
from runtime.files import open_regular

FILE: Final = "tensors/model.safetensors"
"""Where the tensors that pipelines read lie in a bundle."""
PREFIX: Final = 8
"""Bytes of the length of the header, little endian, before the header."""


class Stored(NamedTuple):
    """A tensor of a file: the format's name of its type, its shape, and its bytes, mapped."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def open_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, by name. Raises OSError where the file cannot be read, ValueError where it is damaged."""
    with open_regular(path) as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start = PREFIX + int.from_bytes(whole[:PREFIX], "little")
    try:
        entries: Mapping[str, Any] = json.loads(bytes(whole[PREFIX:start]))
        return {name: _stored(whole[start:], entry) for name, entry in entries.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from None


def _stored(data: memoryview, entry: Mapping[str, Any]) -> Stored:
    first, last = entry["data_offsets"]
    if not 0 <= first <= last <= len(data):
        raise ValueError("it ends too early")
    return Stored(entry["dtype"], tuple(entry["shape"]), data[first:last])


def read_tensor(root: Path, name: str) -> NDArray[np.float32]:
    """A tensor of the checkpoint that the bundle in the folder `root` holds. Raises BundleError when it has none."""
    path = root / FILE
    try:
        found = open_tensors(path)
        if name not in found or found[name].dtype != "F32":
            raise ValueError(f"it has no float32 tensor {name}, only {', '.join(found)}")
        return np.frombuffer(found[name].data, "<f4").reshape(found[name].shape)
    except (OSError, TypeError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}. Build the bundle again") from None
