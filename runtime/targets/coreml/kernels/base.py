"""The registry of operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Kernel = Callable[..., Any]
KERNELS: Final[dict[str, Kernel]] = {}
TYPES: Final[Mapping[str, str]] = {"fp16": "float16", "fp32": "float32"}


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Register the function of an operation."""

    def add(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return add
