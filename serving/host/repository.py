"""A folder of bundles to serve, and what changes in it.

    FOLDER/NAME/manifest.json            the model NAME
    FOLDER/NAME/VERSION/manifest.json    its versions, whole numbers from 1, as KServe and Triton have them
    FOLDER/NAME/int8/manifest.json       the model NAME, where it has no versions, at other numbers, in folders with
    FOLDER/NAME/int4/manifest.json       other names than numbers: one is chosen (`runtime.placing.variants`)

A bundle is complete when its manifest is there: builds rename their folder at the end.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.bundle.manifest import MANIFEST
from runtime.errors import InvalidInput, NotFound
from runtime.placing.variants import variants
from serving.host.offers import VERSION_MARK, Offer, check_name

log = logging.getLogger(__name__)

VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
KEEP_ALIVE: Final = 300.0
"""Seconds that its models stay loaded without requests, unless another time is set."""

Identity = tuple[int, ...]
"""What changes with a manifest, or with one of several: device, number, size, time of the last change in ns."""


@dataclass(frozen=True)
class Changes:
    """New and altered bundles, the highest versions first, and the names of those that are gone."""

    offers: tuple[Offer, ...] = ()
    gone: tuple[str, ...] = ()


class Repository:
    """A folder of bundles, whose models stay loaded for `keep_alive` seconds without requests.

    Raises NotFound if there is no such folder, InvalidInput if it is a bundle itself.
    """

    def __init__(self, root: Path, keep_alive: float = KEEP_ALIVE) -> None:
        if not root.is_dir():
            raise NotFound(f"there is no folder {root}: make it, or name another repository")
        if (root / MANIFEST).is_file():
            raise InvalidInput("repository", f"{root} is a bundle: name the folder above it")
        self.root = root
        self._keep_alive = keep_alive
        self._known: dict[str, Identity] = {}
        self._missed: set[str] = set()
        self._reported: set[str] = set()

    def look(self) -> Changes:
        """What has changed since the last look.

        A bundle is gone when two looks did not find it: a folder that is replaced is missing for a moment. Folders that
        cannot be read count as unchanged. Raises OSError if the repository itself cannot be read.
        """
        found = self._found()
        missing = self._known.keys() - found.keys()
        gone, self._missed = missing & self._missed, missing - self._missed
        new = [name for name, (_, identity) in found.items() if self._known.get(name) != identity]
        self._known = {name: identity for name, identity in self._known.items() if name not in gone}
        self._known |= {name: identity for name, (_, identity) in found.items()}
        offers = [self._offer(name, found[name][0]) for name in new]
        return Changes(tuple(sorted(offers, key=lambda offer: -int(offer.version or 0))), tuple(sorted(gone)))

    def _offer(self, name: str, root: Path) -> Offer:
        version = root.name if name != root.name else ""
        return Offer.of(root, name, self._keep_alive, version, followed=True)

    def _found(self) -> dict[str, tuple[Path, Identity]]:
        """The folder and the manifest's identity of each bundle, by name."""
        found: dict[str, tuple[Path, Identity]] = {}
        for folder in sorted(self.root.iterdir()):
            if self._names_a_model(folder):
                try:
                    found |= dict(_bundles(folder))
                except OSError as error:
                    self._report(folder.name, f"it cannot be read ({error.strerror})")
                    found |= {name: (folder, one) for name, one in self._known.items() if _model(name) == folder.name}
        return found

    def _names_a_model(self, folder: Path) -> bool:
        if folder.name.startswith("."):
            return False
        try:
            check_name(folder.name)
        except InvalidInput as error:
            self._report(folder.name, str(error))
            return False
        if VERSION_MARK in folder.name:
            self._report(folder.name, f"a name with {VERSION_MARK} is that of a version")
            return False
        return folder.is_dir()

    def _report(self, name: str, why: str) -> None:
        """Log once why a folder is passed over."""
        if name not in self._reported:
            self._reported.add(name)
            log.warning("%r in the repository %s: %s", name, self.root, why)


def _bundles(folder: Path) -> Iterator[tuple[str, tuple[Path, Identity]]]:
    """The bundles of a model: the one in its folder, else its versions, else what one is chosen of. Raises OSError."""
    if (identity := _identity(folder)) is not None:
        yield folder.name, (folder, identity)
        return
    versions = False
    for version in folder.iterdir():
        if VERSION.fullmatch(version.name) and (identity := _identity(version)) is not None:
            yield f"{folder.name}{VERSION_MARK}{version.name}", (version, identity)
            versions = True
    others = () if versions else tuple(number for one in variants(folder) for number in _identity(one) or ())
    if others:
        yield folder.name, (folder, others)


def _identity(root: Path) -> Identity | None:
    """That of a bundle's manifest, None if there is none. Raises OSError."""
    try:
        found = (root / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _model(name: str) -> str:
    return name.partition(VERSION_MARK)[0]
