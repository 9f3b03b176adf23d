"""NVIDIA GPUs through cuda-bindings: which there are, memory on them, and streams of work. Imported only by engines that need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import EngineError, MissingDependency
from runtime.optional import require


@dataclass(frozen=True)
class Device:
    """A GPU: its number, its name, its compute capability (89 for 8.9) and its memory in bytes."""

    index: int
    name: str
    capability: int
    memory: int


def runtime(extra: str) -> Any:
    """The module of the CUDA runtime's functions. Raises MissingDependency naming the extra."""
    return require("cuda.bindings.runtime", extra)


def check(result: tuple[Any, ...], doing: str) -> Any:
    """The value or values that a CUDA function returns behind its error code. Raises EngineError saying what was being done."""
    code, *values = result
    if int(code) != 0:
        raise EngineError(f"CUDA could not {doing}: {getattr(code, 'name', code)}")
    return values[0] if len(values) == 1 else tuple(values)


def devices(extra: str) -> tuple[tuple[Device, ...], str]:
    """The GPUs that can be used, in CUDA's order, and why there are none. Never raises."""
    try:
        cuda = runtime(extra)
    except MissingDependency as error:
        return (), str(error)
    code, count = cuda.cudaGetDeviceCount()
    if int(code) != 0 or not count:
        name = getattr(code, "name", str(code)) if int(code) else "it counts none"
        return (), f"there is no NVIDIA GPU that CUDA can use ({name})"
    found = []
    for index in range(count):
        code, properties = cuda.cudaGetDeviceProperties(index)
        if int(code) == 0:
            name = properties.name.decode(errors="replace").rstrip("\0")
            found.append(Device(index, name, 10 * properties.major + properties.minor, properties.totalGlobalMem))
    return tuple(found), "" if found else "CUDA does not describe the GPUs that it counts"
