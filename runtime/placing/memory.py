"""How much memory a submodel takes: estimated from what the bundle says before it is loaded, measured afterwards where
the system tells.

The estimate of weights, from measurements of both samples and of Stable Diffusion 1.5 on both CPU targets (decision
15):

    twice what is stored     of quantized or float32 weights: as stored, and as kernels want them packed
    four times               of half weights that are computed in float32: widened, and packed
    three times              of both together
    once                     on a device of its own, where they are uploaded as they are; half weights that are widened
                             there, twice

and `OVERHEAD` for what the SDK itself needs for a submodel. A decoder's caches are added at their usual length.

What activations take depends on layers that a signature does not show, so it is measured: a submodel is run on samples
of two small sizes, and the growth of the process between them is continued in a straight line over the bytes of its
inputs (`Need`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Array, Dim, Signature, nbytes
from runtime.engine import Engine
from runtime.errors import InvalidInput
from runtime.targets.lowering.nested import is_nested

OVERHEAD: Final = 32 << 20
MARGIN: Final = 1.1
"""What measured memory is multiplied with: two runs do not take the same."""
UNITS: Final = {"": 1, "B": 1} | {
    f"{letter}{ending}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for ending, base in (("B", 1000), ("iB", 1024))
}


def parse_size(field: str, text: str) -> int:
    """Bytes of a size such as 4GiB, 512MB or 1000000. Raises InvalidInput for `field`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    unit = {name.casefold(): size for name, size in UNITS.items()}.get(found[2].casefold()) if found else None
    if found is None or unit is None or not float(found[1]) * unit >= 1:
        raise InvalidInput(field, f"is '{text}', expected a size above 0 such as 4GiB or 512MB")
    return int(float(found[1]) * unit)


def show_size(count: float) -> str:
    """Bytes for reading: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def estimate(submodel: Submodel, half: bool, host: bool) -> int:
    """Bytes that a submodel takes once loaded. `half`: the target computes in half where the bundle asks; `host`: in
    the host's memory.
    """
    words = set(re.findall(r"\w+", submodel.precision))
    stored_half, quantized = (
        bool(words & {"float16", "bfloat16"}),
        any(re.fullmatch(r"int\d|fp8|float8\w*", word) for word in words),
    )
    widened = stored_half and not (half and submodel.compute != "float32")
    factor = (3 if quantized else 4) if widened and host else 2 if host or (widened and not quantized) else 1
    factor *= 2 if is_nested(submodel.precision) else 1  # int4 codes run as int8 ones
    usual = {dim.name: dim.opt for dim in submodel.signature.dims.values()} | {"batch": 1}
    usual |= {name: usual.get("total", length) for name, length in usual.items() if name == "past"}
    return factor * submodel.nbytes + OVERHEAD + nbytes((state.past for state in submodel.signature.states), usual)


@dataclass(frozen=True)
class Need:
    """Memory that a submodel takes: bytes without activations, and for each byte of its inputs."""

    base: int
    slope: float = 0.0

    def at(self, inputs: int) -> int:
        """Bytes in all where the inputs have so many."""
        return int(self.base + self.slope * inputs)

    def inputs_within(self, room: int) -> float:
        """The largest inputs, in bytes, whose need is at most `room`; infinite where inputs cost nothing."""
        return max(0.0, (room - self.base) / self.slope) if self.slope > 0 else float("inf")


def size_of(inputs: Mapping[str, Array]) -> int:
    """Bytes of a call's inputs."""
    return sum(array.nbytes for array in inputs.values())


def measure(engine: Engine, before: int, look: Callable[[], int | None], estimated: int) -> Need:
    """What a submodel was seen to take. `look` tells the process's memory, `before` is what it told before the engine
    was loaded.

    Runs the engine at two small sizes. Returns the estimate where nothing can be seen, and for decoders, whose caches
    are in it.
    """
    signature = engine.submodel.signature
    if signature.states or look() is None:
        return Need(estimated)
    points = []
    for share in (4, 2):
        inputs = sample(signature, share)
        engine.run(inputs)
        points.append((size_of(inputs), max(0, (look() or 0) - before)))
    (small, low), (large, high) = points
    slope = max(0.0, (high - low) / (large - small)) if large > small else 0.0
    return Need(int(MARGIN * max(low - slope * small, 0)) + OVERHEAD // 4, MARGIN * slope)


def sample(signature: Signature, share: int = 4) -> dict[str, Array]:
    """Likely inputs of one row whose dims are one part in so many of the usual length.

    Never of the least length: run once where a layer's picture is 1 by 1, OpenVINO 2026.4 computes other sizes wrongly
    ever after.
    """
    lengths: dict[str, int] = {}
    for dim in sorted(signature.dims.values(), key=lambda dim: len(dim.sum_of)):
        own = 1 if dim.name == "batch" else min(dim.max, max(8 // share * dim.min, dim.opt // share))
        lengths[dim.name] = sum(lengths[name] for name in dim.sum_of) if dim.sum_of else _aligned(own, dim)
    rng = np.random.default_rng(0)
    return {tensor.name: tensor.sample(lengths, rng) for tensor in signature.inputs}


def _aligned(length: int, dim: Dim) -> int:
    return max(dim.min, length // dim.multiple * dim.multiple)


def of_process() -> int | None:
    """Bytes that this process has for itself, without pages of files, which the system can take back; None where it
    does not tell.
    """
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def give_back() -> None:
    """Ask the C library to return freed memory to the system, where it has a way (malloc_trim(3) of glibc)."""
    import ctypes
    import sys

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
