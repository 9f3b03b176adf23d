"""Puts bundles into the folder of a repository, and takes them out. A bundle appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from runtime.bundle.manifest import MANIFEST, SIGNATURE, Bundle, is_file_name
from runtime.errors import BundleError, InvalidInput
from runtime.files import open_regular
from serving.host.offers import VERSION_MARK, check_name
from serving.host.repository import Repository

HIDDEN: Final = ".moving-"
"""What the folders begin with that no repository looks into."""
CHUNK: Final = 1 << 24
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class Copied:
    """So many bytes of a file are copied. `digest` is the sha256 that it has when it is whole."""

    digest: str
    completed: int
    total: int


def place(repository: Repository, model: str, version: str = "") -> Path:
    """The folder of a new model, or of a new version of one. Raises InvalidInput for a name that a folder cannot have,
    and for one that is taken.
    """
    check_name(model)
    if not is_file_name(model) or model.startswith(".") or VERSION_MARK in model:
        raise InvalidInput("name", f"'{model}' cannot be that of a folder: choose one without / and {VERSION_MARK}")
    folder = repository.root / model
    if (folder / MANIFEST).exists() or (folder.exists() and not version) or ((folder / version).exists() and version):
        raise InvalidInput("name", f"'{model}' is there already: delete it first, or choose another name or version")
    return folder / version if version else folder


def copying(bundle: Bundle, to: Path, root: Path) -> Generator[Copied, None, None]:
    """Copy a bundle to the folder `to` of the repository at `root`, and compare each file with its hash. Raises
    BundleError for an altered one. Closing leaves nothing behind.
    """
    staged = root / f"{HIDDEN}{uuid4().hex}"
    staged.mkdir()
    try:
        for relative, digest in bundle.manifest.files.items():
            yield from _copied(bundle.root / relative, staged / relative, digest)
        with suppress(FileNotFoundError), open_regular(bundle.root / SIGNATURE) as signature:
            (staged / SIGNATURE).write_bytes(signature.read())
        (staged / MANIFEST).write_bytes(bundle.content)
        to.parent.mkdir(exist_ok=True)
        staged.rename(to)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove(bundle: Path, root: Path) -> None:
    """Take a bundle out of the repository at `root`. Whoever has its files open keeps them."""
    gone = root / f"{HIDDEN}{uuid4().hex}"
    bundle.rename(gone)
    shutil.rmtree(gone)
    if bundle.parent != root:
        with suppress(OSError):  # other versions are there
            bundle.parent.rmdir()


def _copied(source: Path, to: Path, expected: str) -> Generator[Copied, None, None]:
    to.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    with open_regular(source) as reading, to.open("xb") as writing:
        total, done = os.fstat(reading.fileno()).st_size, 0
        yield Copied(expected, 0, total)
        while chunk := reading.read(CHUNK):
            found.update(chunk)
            writing.write(chunk)
            done += len(chunk)
            yield Copied(expected, done, total)
    if found.hexdigest() != expected:
        raise BundleError(f"{source} was altered: copy or build its bundle again")
