"""Imports optional packages: vendor SDKs on the device side, graph tools on the build side."""

from __future__ import annotations

import importlib
from typing import Any

from runtime.errors import MissingDependency


def require(package: str, extra: str) -> Any:
    """Import a package by name. Raises MissingDependency that names the extra to install, or the error of the import.

    An SDK whose native libraries are missing fails in one of its own imports or with an error of the system.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise MissingDependency(package if package.startswith(missing) else missing, extra) from None
    except (ImportError, OSError) as error:
        raise MissingDependency(package, extra, " ".join(str(error).split())) from None
