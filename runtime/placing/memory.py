"""Memory of a submodel: estimated from the manifest before loading, measured after loading where the system reports
it.

The estimate multiplies the stored bytes of the weights. The factors come from measurements of both samples and of
Stable Diffusion 1.5 on both CPU targets (decision 15):

    2    in host memory: weights as stored, and packed for the kernels
    4    in host memory, half-precision weights that are computed in float32: widened, and packed
    3    in host memory, quantized weights with the other weights in half precision, computed in float32
    1    in a device's own memory: weights are uploaded as they are stored
    2    in a device's own memory, half-precision weights that are widened there

`OVERHEAD` is added for the SDK, and the caches of a decoder at their usual length.

The memory of activations depends on layers that a signature does not show, so it is measured: the submodel runs on
inputs of two small sizes, and the growth of the process is extrapolated linearly over the bytes of the inputs (`Need`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import BATCH, Array, Dim, Signature, nbytes
from runtime.engine import Engine
from runtime.errors import InvalidInput

OVERHEAD: Final = 32 << 20
MARGIN: Final = 1.1
"""Factor on measured memory: it differs from run to run."""
UNITS: Final = {"": 1, "B": 1} | {
    f"{letter}{ending}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for ending, base in (("B", 1000), ("iB", 1024))
}


def parse_size(field: str, text: str, least: int = 1) -> int:
    """Bytes of a size such as 4GiB, 512MB or 1000000, `least` or more. Raises InvalidInput for `field`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    unit = {name.casefold(): size for name, size in UNITS.items()}.get(found[2].casefold()) if found else None
    if found is None or unit is None or not float(found[1]) * unit >= least:
        raise InvalidInput(field, f"is '{text}', expected a size {'above 0 ' if least else ''}such as 4GiB or 512MB")
    return int(float(found[1]) * unit)


def show_size(count: float) -> str:
    """Bytes as text with a unit, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def estimate(submodel: Submodel, half: bool, host: bool) -> int:
    """Estimated bytes of a loaded submodel. `half`: the target can compute in the submodel's half-precision type;
    `host`: it uses the host's memory.
    """
    precision = submodel.precision
    stored_half, quantized = not {"float16", "bfloat16"}.isdisjoint(precision.weights), precision.quantized
    widened = stored_half and not (half and precision.compute != "float32")
    factor = (3 if quantized else 4) if widened and host else 2 if host or (widened and not quantized) else 1
    factor *= 2 if precision.nested else 1  # int4 codes run as int8 ones
    return factor * submodel.nbytes + OVERHEAD + _caches(submodel.signature)


def _caches(signature: Signature) -> int:
    """Bytes of a decoder's caches, for one row of the usual length."""
    if signature.port is None:
        return 0
    usual = signature.port.lengths(past=signature.dims[signature.port.total].opt, sequence=0)
    return nbytes((state.past for state in signature.states), usual)


@dataclass(frozen=True)
class Need:
    """Memory of a submodel: `base` bytes without activations, and `slope` bytes for each byte of its inputs."""

    base: int
    slope: float = 0.0

    def at(self, inputs: int) -> int:
        """Bytes in all for inputs of this many bytes."""
        return int(self.base + self.slope * inputs)

    def inputs_within(self, room: int) -> float:
        """Bytes of the largest inputs that need at most `room`; infinite if the slope is zero."""
        return max(0.0, (room - self.base) / self.slope) if self.slope > 0 else float("inf")


def size_of(inputs: Mapping[str, Array]) -> int:
    """Bytes of a call's inputs."""
    return sum(array.nbytes for array in inputs.values())


def measure(engine: Engine, before: int, look: Callable[[], int | None], estimated: int) -> Need:
    """Measure the memory of a loaded engine by running it on inputs of two small sizes.

    `look` returns the bytes of the process; `before` is its result from before the engine was loaded. Returns the
    estimate if `look` returns None, and for submodels with caches, which the estimate includes.
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
    """Sample inputs with batch 1, whose other dims are the usual length divided by `share`.

    Dims stay above their minimum: after one run in which a feature map is 1 by 1, OpenVINO 2026.4 computes other sizes
    wrongly.
    """
    lengths: dict[str, int] = {}
    for dim in signature.dims.values():
        own = 1 if dim.name == BATCH.name else min(dim.max, max(8 // share * dim.min, dim.opt // share))
        if not dim.sum_of:
            lengths[dim.name] = _aligned(own, dim)
    return signature.sample_call(signature.complete(lengths), np.random.default_rng(0))


def _aligned(length: int, dim: Dim) -> int:
    return max(dim.min, length // dim.multiple * dim.multiple)


def of_process() -> int | None:
    """Bytes of anonymous memory of this process; None if the system does not report it. Pages of files do not count:
    the system can reclaim them.
    """
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
