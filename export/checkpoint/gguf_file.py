"""GGUF files of Stable Diffusion (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), read with the `gguf`
package. Tensors in a format of safetensors are byte ranges of the file. Those in blocks of ggml's quantization are
dequantized one at a time into a float32 file in the cache, as `gguf.quants.dequantize` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from export.build.staging import key_of
from export.checkpoint.component import LDM
from export.checkpoint.tensors import DTYPES, TensorRef
from runtime.errors import MissingDependency, SourceError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX: Final = ".gguf"
UNET: Final = LDM[0]
ORIGINAL: Final = "comfy.gguf.orig_shape."
"""Metadata of a tensor that was reshaped so that its rows divide into blocks: its shape before."""


def read_gguf(file: Path, values: bool = True) -> tuple[bytes, dict[str, TensorRef]]:
    """The header's bytes and every tensor by name, as `read_header` gives those of a safetensors file. A UNet alone
    has its names in a whole model. Without `values` only shapes are known of quantized tensors.

    Raises MissingDependency, and SourceError for a file that is damaged or in another format.
    """
    reader = _opened(file)
    header = bytes(reader.data[: reader.data_offset])
    prefix = "" if any(one.name.startswith(LDM) for one in reader.tensors) else UNET
    found, quantized = {}, {}
    for tensor in reader.tensors:
        stored, shape = tensor.tensor_type.name, _shape(reader, tensor)
        name = prefix + tensor.name
        found[name] = TensorRef(file, int(tensor.data_offset), int(tensor.n_bytes), stored, shape)
        if stored not in DTYPES:
            quantized[name] = tensor
    if values and quantized:
        found |= _dequantized(file, header, found, quantized)
    return header, found


def _opened(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingDependency("gguf", "export") from None
    try:
        return GGUFReader(file)
    except Exception as error:  # it reads counts and offsets as they are, and fails in numpy
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{file} is no GGUF file that can be read ({type(error).__name__}: {reason}). Download it again"
        ) from None


def _shape(reader: GGUFReader, tensor: ReaderTensor) -> tuple[int, ...]:
    """The tensor's shape, slowest axis first."""
    field = reader.get_field(f"{ORIGINAL}{tensor.name}")
    if field is None:
        return tuple(int(length) for length in reversed(tensor.shape.tolist()))
    shape = tuple(int(field.parts[place][0]) for place in field.data)
    if math.prod(shape) != tensor.n_elements:
        raise SourceError(f"{tensor.name} has {tensor.n_elements} values, its original shape is {list(shape)}")
    return shape


def _dequantized(
    file: Path, header: bytes, refs: Mapping[str, TensorRef], tensors: Mapping[str, ReaderTensor]
) -> dict[str, TensorRef]:
    """The tensors as float32, in a file of the cache."""
    from export.checkpoint.changes import Change, Changes

    now = file.stat()
    key = key_of("gguf", header.hex(), now.st_size, now.st_mtime_ns, str(file.resolve()))
    weights = {
        name: Change(refs[name].shape, partial(_values, tensor, refs[name].shape)) for name, tensor in tensors.items()
    }
    computed = Changes(key, {"": weights})
    computed.write()
    return computed.refs("")


def _values(tensor: ReaderTensor, shape: tuple[int, ...]) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    found: Any = dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(found, np.float32).reshape(shape)
