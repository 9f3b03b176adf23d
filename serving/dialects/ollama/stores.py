"""The folders that clients may change and take from: the repository, a library of bundles, and one of checkpoints.

What a client names is only compared with the names of what lies there; it is never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from serving.dialects.ollama import names
from serving.host.models import ModelHost
from serving.host.offers import Offer
from serving.host.repository import Repository
from serving.settings import Settings

T = TypeVar("T")
SOURCES: Final = ("library", "checkpoints")
"""Settings of folders that bundles come from."""


class Stores:
    """The folders of a server. Raises InvalidInput and NotFound for settings that do not fit together."""

    def __init__(self, host: ModelHost, settings: Settings) -> None:
        self._host = host
        self._library, self._checkpoints = settings.library, settings.checkpoints
        for name in SOURCES:
            folder: Path | None = getattr(settings, name)
            if folder is None:
                continue
            if settings.repository is None:
                raise InvalidInput(name, "is where bundles of a repository come from: name a --repository as well")
            if not folder.is_dir():
                raise NotFound(f"there is no folder {folder}: make it, or name another with --{name}")

    @property
    def repository(self) -> Repository:
        """Where bundles are put. Raises InvalidInput if there is none."""
        if self._host.repository is None:
            raise InvalidInput("model", "cannot be stored: this server has no --repository to put bundles into")
        return self._host.repository

    @property
    def library(self) -> Repository:
        """Where bundles are copied from, and to. Raises InvalidInput if there is none."""
        if self._library is None:
            raise InvalidInput("model", "cannot be pulled or pushed: this server has no --library")
        return Repository(self._library)

    def bundle(self, name: str) -> Offer:
        """The bundle of the library that a client calls `name`; without a version the highest. Raises NotFound, and the
        error of a bundle that cannot be opened.
        """
        offers = self.library.look().offers
        highest = {offer.model: offer for offer in reversed(offers)}
        offer = _named(names.served(name), highest | {one.name: one for one in offers}, "in the library")
        if offer.error is not None:
            raise offer.error
        return offer

    def own(self, name: str) -> Offer:
        """The bundle of the repository that a client calls `name`. Raises NotFound, and InvalidInput for one that lies
        elsewhere, and for a name that stands for one of several versions.
        """
        offer = self._host.catalog.find(names.known(self._host, name)).offer
        if not offer.followed:
            raise InvalidInput(
                "model", f"{offer.name} was named when the server started: it does not lie in its repository"
            )
        versions = [one.name for one in self._host.catalog if one.offer.model == offer.model]
        if len(versions) > 1 and names.served(name) == offer.model:
            raise InvalidInput("model", f"{offer.model} has several versions: name one, as in {names.tagged(offer)}")
        return offer

    def checkpoint(self, name: str) -> Path:
        """The checkpoint that a client calls `name`, a folder or a file. Raises NotFound."""
        if self._checkpoints is None:
            raise InvalidInput("from", "cannot be built: this server has no --checkpoints to build from")
        found = {entry.name: entry.absolute() for entry in self._checkpoints.iterdir() if entry.name[:1] != "."}
        return _named(name, found, "among the checkpoints")


def _named(name: str, found: Mapping[str, T], where: str) -> T:
    if name not in found:
        raise NotFound(f"there is no {quoted(name)} {where}: {did_you_mean(name, found)}")
    return found[name]
