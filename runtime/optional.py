"""Packages that only some machines have: vendor SDKs on the device side, graph tools on the build side."""

from __future__ import annotations

import importlib
from typing import Any

from runtime.errors import MissingDependency


def require(package: str, extra: str) -> Any:
    """Import a package by name. Raises MissingDependency naming the extra that installs it, or why it cannot be
    imported.

    A vendor's SDK without its libraries fails in an import of its own, or with the system's error.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise MissingDependency(package if package.startswith(missing) else missing, extra) from None
    except (ImportError, OSError) as error:
        raise MissingDependency(package, extra, " ".join(str(error).split())) from None
