"""A dialect of HTTP: the paths and messages that the clients of another program use.

Each dialect is a folder in `serving/dialects/` with a module `dialect`, found by listing. It only translates: what it
calls is the `ModelHost`, and what surrounds its calls is in `serving/dialects/http/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import APIRouter

import serving.dialects
from runtime.errors import EnginecastError
from serving.host.models import ModelHost
from serving.settings import Settings


@dataclass(frozen=True)
class Dialect:
    """One dialect. A folder in `serving/dialects/` declares one as `DIALECT` in its module `dialect`.

    `prefixes` are what its paths begin with. `router` makes its endpoints for a host; their routes are of the class
    `Route`. `body` is the JSON of an error with its HTTP status.
    """

    name: str
    prefixes: tuple[str, ...]
    router: Callable[[ModelHost, Settings], APIRouter]
    body: Callable[[EnginecastError, int], Mapping[str, Any]]


@cache
def dialects() -> tuple[Dialect, ...]:
    """Every dialect, sorted by name."""
    folders = sorted(found.name for found in pkgutil.iter_modules(serving.dialects.__path__) if found.ispkg)
    names = [f"{serving.dialects.__name__}.{folder}.dialect" for folder in folders if folder != "http"]
    return tuple(importlib.import_module(name).DIALECT for name in names if importlib.util.find_spec(name))


def dialect_of(path: str) -> Dialect | None:
    """The dialect that a path belongs to, None if it is of none."""
    fitting = (dialect for dialect in dialects() if path.startswith(dialect.prefixes))
    return next(fitting, None)
