"""Packages (.mlpackage): a program written with its weights, one at a time, and read back as the specification that
Core ML would read.

Of the layout of weights, what is read here is the metadata of each blob: 64 bytes, with a magic number, the type, the
number of bytes and the offset of the data (https://github.com/apple/coremltools,
mlmodel/src/MILBlob/Blob/StorageFormat.hpp).
"""

from __future__ import annotations

import mmap
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from runtime.bundle.signature import Array
from runtime.errors import EngineError
from runtime.optional import require
from runtime.targets.coreml.sdk import converting, coremltools

PASSES: Final = (
    "common::const_elimination",
    "common::noop_elimination",
    "common::cast_optimization",
    "common::const_elimination",
    "common::dead_code_elimination",
)
"""Passes that are run: those that make shapes fixed where possible. The default passes would read all weights, some
several times.
"""
MAGIC: Final = 0xDEADBEEF
METADATA: Final = struct.Struct("<IIQQ")
MODEL: Final = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS: Final = Path("Data/com.apple.CoreML/weights/weight.bin")


def save(program: Any, inputs: list[Any], path: Path) -> None:
    """Write a program as the package `path`, which must not exist yet. `inputs` are coremltools' input types.

    Raises EngineError with coremltools' message.
    """
    ct = coremltools()
    part = path.with_name(f".{path.stem}.part.mlpackage")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with converting(path.parent):
            ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                inputs=inputs or None,
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,  # the types of the program stay
                pass_pipeline=ct.PassPipeline(list(PASSES), "enginecast"),
                skip_model_load=True,
                package_dir=str(part),
            )
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise EngineError(f"coremltools {ct.__version__} could not write {path.name}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Package:
    """A package on disk: its specification, and its weights, mapped."""

    def __init__(self, path: Path) -> None:
        """Raises EngineError when it is missing, damaged or no ML program."""
        self.path = path
        coremltools()
        model = require("coremltools.proto.Model_pb2", "coreml")
        try:
            self.spec = model.Model.FromString((path / MODEL).read_bytes())
        except (OSError, DecodeError) as error:
            raise EngineError(
                f"could not compile {path}: its model cannot be read ({error}). Build the bundle again"
            ) from None
        if self.spec.WhichOneof("Type") != "mlProgram" or "main" not in self.spec.mlProgram.functions:
            raise EngineError(f"could not compile {path}: it holds no ML program. Build the bundle again")
        self.function = self.spec.mlProgram.functions["main"]
        self._weights: Any = None

    @property
    def operations(self) -> Any:
        """The operations of the program, in order."""
        return self.function.block_specializations[self.function.opset].operations

    @property
    def outputs(self) -> list[str]:
        return list(self.function.block_specializations[self.function.opset].outputs)

    def blob(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """Weights at an offset of the package's file, as a view where they are whole bytes. int4 come unpacked, as
        int8.

        Raises EngineError when they are not there.
        """
        if self._weights is None:
            try:
                with (self.path / WEIGHTS).open("rb") as file:
                    self._weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise EngineError(
                    f"could not compile {self.path}: its weights cannot be read ({error}). Build the bundle again"
                ) from None
        count = int(np.prod(shape))
        stored = "uint8" if dtype == "int4" else dtype
        wanted = (count + 1) // 2 if dtype == "int4" else count * np.dtype(stored).itemsize
        magic, _, size, start = (
            METADATA.unpack_from(self._weights, offset) if offset + 64 <= len(self._weights) else (0, 0, 0, 0)
        )
        if magic != MAGIC or size != wanted or start + size > len(self._weights):
            raise EngineError(
                f"could not compile {self.path}: its weights end before those at {offset}. Build the bundle again"
            )
        data = np.frombuffer(self._weights, stored, size // np.dtype(stored).itemsize, start)
        return (unpacked(data, count) if dtype == "int4" else data).reshape(shape)


def unpacked(data: NDArray[np.uint8], count: int) -> Array:
    """Unpack signed 4-bit numbers, two in a byte with the first in the lower half, to int8."""
    codes = np.empty(2 * data.size, np.int8)
    codes[0::2] = (data << 4).view(np.int8) >> 4
    codes[1::2] = data.view(np.int8) >> 4
    return codes[:count]
