"""What a server offers: bundles, the names they are served by, and the limits of each model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from runtime import limits as bounds
from runtime.bundle.manifest import Bundle
from runtime.errors import EnginecastError, InvalidInput, quoted
from runtime.pipeline import pipelines
from runtime.placing.variants import chosen

log = logging.getLogger(__name__)

VERSION_MARK: Final = "@"
"""Stands before the version in the name of a model."""
ENDLESS: Final = math.inf
"""The keep-alive of a model that stays loaded until another one needs its memory."""


@dataclass(frozen=True)
class Limits:
    """Limits of each model: `slots` requests run at once, taking turns or in one run of the engines, and `max_queue`
    more wait. On unloading they get `grace_seconds` to finish.
    """

    slots: int = 8
    max_queue: int = 16
    grace_seconds: float = 30.0


@dataclass(frozen=True)
class Offer:
    """A bundle and the name it is served by. `error` says why the bundle could not be opened; loading succeeds once it
    is repaired.

    Only the bundle that was opened is served. If another one is put into its folder later, loading refuses it, and
    reloading takes it.

    `keep_alive` is the number of seconds that the model stays loaded without requests, `ENDLESS` if only memory for
    another model ends that, None if nothing does. An offer that is `followed` is one of a repository: it is loaded for
    its first request, not when the server starts, and the bundle that is in the folder then is served.
    """

    name: str
    root: Path
    bundle: Bundle | None = None
    error: EnginecastError | None = None
    keep_alive: float | None = None
    version: str = ""
    followed: bool = False

    @property
    def quant(self) -> str:
        return self.bundle.manifest.quant if self.bundle else ""

    @property
    def task(self) -> str | None:
        """The task that the model does, if the bundle could be opened."""
        return self.bundle.manifest.task if self.bundle else None

    @cached_property
    def abilities(self) -> Mapping[str, Any]:
        """What requests to the bundle may ask for (`ModelPipeline.abilities`), nothing where that cannot be read:
        loading says why.
        """
        try:
            manifest = self.bundle.manifest if self.bundle else None
            if manifest is None or manifest.pipeline not in pipelines():
                return {}
            return pipelines()[manifest.pipeline].abilities(self.root, manifest.config)
        except EnginecastError:
            return {}

    @property
    def model(self) -> str:
        """The name without the version."""
        return self.name.removesuffix(f"{VERSION_MARK}{self.version}") if self.version else self.name

    def same(self, other: Offer) -> bool:
        """Whether both have the same bundle: its manifest has the hashes of all files."""
        return self.bundle is not None and other.bundle is not None and self.bundle.content == other.bundle.content

    def again(self) -> Offer:
        """The bundle that is in the folder now, offered in the same way."""
        found = Offer.of(self.root, self.name)
        return replace(self, bundle=found.bundle, error=found.error)

    @classmethod
    def of(
        cls, root: Path, name: str = "", keep_alive: float | None = None, version: str = "", followed: bool = False
    ) -> Offer:
        """Offer the bundle at `root` by `name`, else by the name in its manifest, or by its folder's name if it cannot
        be opened or is one that is chosen of several there (`runtime.placing.variants`).
        """
        given = keep_alive, version, followed
        try:
            found = chosen(root)
        except EnginecastError as error:
            return cls(name or root.absolute().name, root, None, error, *given)
        if found.decision:
            log.info("model %s: %s is served, %s", name or root.name, found.decision.value, found.decision.reason)
        own = root.absolute().name if found.decision else found.bundle.name
        return cls(name or own, found.bundle.root, found.bundle, None, *given)


def check_name(name: str) -> None:
    """Raise InvalidInput unless a model can be served by this name."""
    bounds.MODEL_NAME.length("name", name)
    if not name or not name.isprintable() or name != name.strip():
        raise InvalidInput(
            "name", f"{quoted(name)} cannot name a model: choose a name of printable characters, as in NAME=DIR"
        )
