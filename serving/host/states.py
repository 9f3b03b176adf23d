"""The status of a model, as clients see it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol


class ModelState(Enum):
    """Whether a model can be used."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True)
class SubmodelStatus:
    """The engine that really runs a submodel."""

    submodel: str
    target: str
    device: str
    precision: str
    fallbacks: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """The current status of a model.

    `task` is known once its bundle was opened; `target`, `device`, `placements` and `notes` while the model is loaded;
    `error` after a load that failed. `counts` are those of `serving.host.observing.Counts`.

    `version` is empty unless the model has several, and `is_default` says whether requests that state none reach it.

    `on_demand`: the next request loads it. `reloading`: its bundle is being loaded again beside it. `memory` has the
    bytes that it takes of each device's memory while it is loaded. `idle_seconds` have passed since its last request,
    or since it was loaded, and without another it is unloaded in `unload_seconds`; both are None unless it is idle.
    `abilities` are what its requests may ask for (`ModelPipeline.abilities`). While a model is loaded, `placements` has
    the submodels that are there, and `coming` names the others: requests run already and wait for them.
    """

    name: str
    state: ModelState
    quant: str
    task: str | None
    target: str | None
    device: str | None
    error: str | None
    running: int
    queued: int
    placements: tuple[SubmodelStatus, ...] = ()
    notes: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    version: str = ""
    is_default: bool = False
    on_demand: bool = False
    reloading: bool = False
    memory: Mapping[str, int] = field(default_factory=dict)
    idle_seconds: float | None = None
    unload_seconds: float | None = None
    abilities: Mapping[str, Any] = field(default_factory=dict)
    coming: tuple[str, ...] = ()


class Models(Protocol):
    """What can be read of the models of a server: a `ModelHost`, or the models of a cluster."""

    changed: asyncio.Event
    """Is set and replaced by a new one when the state of a model changes."""

    @property
    def stopping(self) -> bool:
        """Whether the server stops."""

    def statuses(self) -> list[Status]:
        """The status of every model, sorted by name."""

    def status(self, name: str) -> Status:
        """The status of a model. Raises NotFound with the nearest name."""

    def ready(self) -> dict[str, str | None]:
        """The task of each model, None if it cannot be used now."""
