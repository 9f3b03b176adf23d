"""Energy that was spent while something ran, where the machine counts it: processor packages by Linux' powercap (RAPL),
NVIDIA GPUs by NVML. Everything that the machine did meanwhile is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from runtime.errors import MissingDependency
from runtime.optional import require
from runtime.placing.devices import EXTRA

T = TypeVar("T")
POWERCAP: Final = Path("/sys/class/powercap")
PACKAGES: Final = "intel-rapl:[0-9]*"
"""Zones of whole packages, also those of AMD's processors. Zones in them have a second colon."""
MICRO: Final = 1e-6
MILLI: Final = 1e-3


@dataclass(frozen=True)
class Counter:
    """A count of joules that goes on from 0 after it has reached `range`."""

    read: Callable[[], float]
    range: float = float("inf")

    def between(self, begin: float, end: float) -> float:
        """The joules from one reading to the next."""
        return end - begin if end >= begin else end - begin + self.range


Meter = tuple[Counter, ...]


def meter(powercap: Path = POWERCAP) -> Meter:
    """The counters that this process may read; none where the machine has none, or keeps them from its users."""
    return (*_packages(powercap), *_gpus())


def metered(meter: Meter, run: Callable[[], T]) -> tuple[T, float | None]:
    """What `run` returns, and the joules that were spent meanwhile; None without counters."""
    begin = [counter.read() for counter in meter]
    value = run()
    spent = [counter.between(before, counter.read()) for counter, before in zip(meter, begin, strict=True)]
    return value, sum(spent) if meter else None


def _packages(folder: Path) -> list[Counter]:
    found = []
    for zone in sorted(folder.glob(PACKAGES)):
        if zone.name.count(":") > 1:
            continue
        with suppress(OSError, ValueError):  # since Linux 5.10 only root may read
            read = partial(_microjoules, zone / "energy_uj")
            read()
            found.append(Counter(read, _microjoules(zone / "max_energy_range_uj")))
    return found


def _microjoules(file: Path) -> float:
    return int(file.read_text()) * MICRO


def _gpus() -> list[Counter]:
    try:
        nvml: Any = require("pynvml", EXTRA)
    except MissingDependency:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or another version of it
        return []
    found = []
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        with suppress(nvml.NVMLError):  # before Volta, GPUs count no energy
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            found.append(Counter(partial(_millijoules, nvml, handle)))
    return found


def _millijoules(nvml: Any, handle: Any) -> float:
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * MILLI
