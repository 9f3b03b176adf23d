"""What the C library does with freed memory: glibc keeps it, and the next array that is no larger needs no new pages.

Each function does nothing with a C library that has no such settings (malloc_trim(3), mallopt(3)).
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_ARENAS = -1, -3, -8  # of malloc.h
SMALL: Final = 1 << 20
KEPT: Final = 32 << 20
"""glibc's highest limit, which it comes to by itself."""


def give_back() -> None:
    """Return freed memory to the system now."""
    if trim := _function("malloc_trim"):
        trim(0)


def collect() -> None:
    """Free what only refers to itself, such as parts of closed engines, and return it to the system."""
    gc.collect()
    give_back()


def return_freed_memory(most_arenas: int | None = None) -> None:
    """From now on, blocks of a megabyte and more go back to the system once freed.

    glibc would raise that limit to 32 MB and keep freed layers: with Stable Diffusion's, half a gigabyte more at the
    peak of a build.
    """
    _set(_TRIM_THRESHOLD, SMALL)
    _set(_MMAP_THRESHOLD, SMALL)
    if most_arenas is not None:
        _set(_MOST_ARENAS, most_arenas)


def keep_freed_memory() -> None:
    """Restore glibc's default: where blocks return at once, every array needs new pages, which takes time."""
    _set(_MMAP_THRESHOLD, KEPT)
    _set(_TRIM_THRESHOLD, 2 * KEPT)


def _set(option: int, value: int) -> None:
    if mallopt := _function("mallopt"):
        mallopt(option, value)


def _function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
