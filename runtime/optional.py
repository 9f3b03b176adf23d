"""Packages that only some machines have: vendor SDKs on the device side, graph tools on the build side."""

from __future__ import annotations

import importlib
from typing import Any

from runtime.errors import MissingDependency


def require(package: str, extra: str) -> Any:
    """Import a package by name. Raises MissingDependency naming the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingDependency(package, extra) from None
