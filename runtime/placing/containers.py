"""The processors and memory that this process may use: limits of control groups (Linux, versions 1 and 2) and
processor affinity.

The files are documented in the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. A group's
limit also applies to the groups below it, so every group from the process's own to the root is read. Unreadable files
set no limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
UNLIMITED: Final = 1 << 60
"""Version 1 writes a number from here on for "no limit"."""


@dataclass(frozen=True)
class Allowance:
    """What this process may use. `cpus` is a number of processors, perhaps a fraction (a quota of their time). `memory`
    and `free` are in bytes, None without a limit.
    """

    cpus: float
    memory: int | None = None
    free: int | None = None

    @property
    def threads(self) -> int:
        """Threads that keep these processors busy without waiting for their quota."""
        return max(1, int(self.cpus))


def allowance(proc: Path = PROC) -> Allowance:
    """What this process may use now. Never raises."""
    cpus: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory: int | None = None
    free: int | None = None
    for version, controllers, folder in _groups(proc / "self"):
        if "cpu" in controllers:
            cpus = min(cpus, _quota(version, folder) or cpus)
        if "memory" in controllers:
            limit, left = _memory(version, folder)
            memory, free = _least(memory, limit), _least(free, left)
    return Allowance(cpus, memory, free)


def _groups(process: Path) -> Iterator[tuple[int, set[str], Path]]:
    """The version, the controllers and the folder of every group that the process is in, from its own to the root."""
    mounts = dict(_mounts(_text(process / "mountinfo")))
    for line in _text(process / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        controllers = frozenset(names.split(",")) - {""}
        found = next(
            ((kept, *place) for kept, place in mounts.items() if kept == controllers or kept & controllers), None
        )
        if found is None:
            continue
        _, mount, root = found
        inside = path.removeprefix(root.rstrip("/")).strip("/")
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield (
                (1, set(controllers), mount.joinpath(*parts[:depth]))
                if controllers
                else (2, {"cpu", "memory"}, mount.joinpath(*parts[:depth]))
            )


def _mounts(mountinfo: str) -> Iterator[tuple[frozenset[str], tuple[Path, str]]]:
    """The mount point and root of each hierarchy, by its controllers; the set is empty for version 2. See proc(5)."""
    for line in mountinfo.splitlines():
        place, _, kind = line.partition(" - ")
        words, (system, _, options) = place.split(), ([*kind.split(), "", "", ""])[:3]
        if len(words) < 5 or system not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(options.split(",")) - {"rw", "ro"} if system == "cgroup" else frozenset()
        yield frozenset(controllers), (Path(words[4]), words[3])


def _quota(version: int, folder: Path) -> float | None:
    """The number of processors whose time a group may use."""
    if version == 2:
        words = _text(folder / "cpu.max").split()
        quota, period = (_number(word) for word in ([*words, "", ""])[:2])
    else:
        quota, period = (_number(_text(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return quota / period if quota and period else None


def _memory(version: int, folder: Path) -> tuple[int | None, int | None]:
    """A group's limit and its free part, in bytes. Inactive pages of files count as free: the kernel reclaims them."""
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    limit, used = _number(_text(folder / names[0])), _number(_text(folder / names[1]))
    if limit is None or limit >= UNLIMITED:
        return None, None
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    stale = next((_number(pair[1]) or 0 for pair in words if len(pair) == 2 and pair[0] == names[2]), 0)
    return limit, max(0, min(limit, limit - (used or 0) + stale))


def _least(old: int | None, new: int | None) -> int | None:
    return min((value for value in (old, new) if value is not None), default=None)


def _number(text: str) -> int | None:
    """A count; None for "max", -1 and anything else that is not one."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""
