"""What a figure depends on besides the bundle: processor, threads, versions, how fast memory can be read."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from runtime.placing.processor import processor

PACKAGES: Final = ("numpy", "onnxruntime", "openvino", "tokenizers")


def threads() -> int:
    """Processors that this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug() -> str:
    """A file name for this kind of machine, without its host name: "amd-epyc-family-25-model-17-2-threads"."""
    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {threads()} threads".lower()).strip("-")


def version(package: str) -> str:
    """The installed version of a distribution, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of what always matters and of the packages named; what is not installed is left out."""
    found = {name: version(name) for name in (*PACKAGES, *packages)}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}


def program() -> str:
    """This program's name and version, for rows."""
    return f"enginecast {version('enginecast')}".strip()


class Others:
    """Tells how busy other programs kept the processors since it was made, where the system counts that (Linux)."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Share of the processors' time that other programs had, 0 to 1; None where it is not known."""
        now = self._now()
        if self._start is None or now is None:
            return None
        busy, own, whole = (end - begin for begin, end in zip(self._start, now, strict=True))
        return min(max((busy - own) / whole, 0.0), 1.0) if whole > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processors so far: spent on any program, spent on this process, and spent or idle; see
        proc_stat(5).
        """
        file = Path("/proc/stat")
        if not file.is_file():
            return None
        user, nice, system, idle, waiting, interrupts, soft, stolen = (
            int(word) for word in file.read_text().split()[1:9]
        )
        busy = user + nice + system + interrupts + soft + stolen
        tick, own = os.sysconf("SC_CLK_TCK"), os.times()
        return busy / tick, own.user + own.system, (busy + idle + waiting) / tick


def read_bandwidth(nbytes: int = 1 << 29, repeat: int = 5) -> float:
    """Bytes a second at which all processors together read memory: numpy's maximum over an array far larger than the
    caches.

    The maximum is taken because it needs the least arithmetic for each element; the best of `repeat` runs counts.
    """
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads())
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(repeat):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # numpy lets go of the interpreter lock while it reduces
            best = max(best, nbytes / (time.perf_counter() - start))
    return best
