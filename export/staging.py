"""Nothing half written, nothing left behind: a build happens in a hidden folder that becomes the output by one rename, or vanishes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

from runtime.bundle import MANIFEST
from runtime.errors import InvalidInput, ResourceExhausted

JANITOR: Final = """
import pathlib, shutil, sys
sys.stdin.read()
folder, cache, process = sys.argv[1:]
shutil.rmtree(folder, ignore_errors=True)
for path in pathlib.Path(cache).glob(f"*.{process}.*"):
    path.unlink(missing_ok=True)
"""
"""Waits for the end of its input, which also comes when the build is killed, and removes the folder and what is unfinished in the cache."""


@contextmanager
def staging(output: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place when the block ends well and is removed otherwise, even after SIGKILL.

    Raises InvalidInput when `output` exists and is not ours to replace, ResourceExhausted when the disk is full.
    """
    _check_replaceable(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix=f".{output.name}.building-", dir=output.parent))
    except OSError as error:
        raise ResourceExhausted(f"cannot write beside {output}: {error.strerror}. Choose another --output") from None
    arguments = [str(folder), str(cache_folder()), str(os.getpid())]
    janitor = subprocess.Popen([sys.executable, "-c", JANITOR, *arguments], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
        folder.chmod(0o755)
        _replace(folder, output)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{output.parent} or the cache {cache_folder()}"
        raise ResourceExhausted(f"the disk of {where} is full: free some space, choose another --output or set ENGINECAST_CACHE") from None
    finally:
        janitor.communicate()


def _check_replaceable(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise InvalidInput("output", f"{output} exists and is no bundle: choose another folder")
    if any(output.iterdir()) and not force:
        raise InvalidInput("output", f"{output} holds another bundle: choose another folder, or replace it with --force")


def _replace(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`. What was there is moved aside first and removed last, so that one of the two is always whole."""
    if not output.exists():
        folder.rename(output)
        return
    aside = Path(mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    output.rename(aside / output.name)
    folder.rename(output)
    shutil.rmtree(aside, ignore_errors=True)


def cache_folder() -> Path:
    """Where finished steps are kept: $ENGINECAST_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginecast"
    return Path(os.environ.get("ENGINECAST_CACHE") or default)


def key_of(*facts: Any) -> str:
    """Hex sha256 of JSON-serialisable facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def cached(key: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """The file kept under `key`; made by `make(path)` when it is not there yet. Only whole files are ever seen."""
    path = cache_folder() / f"{key}{suffix}"
    if not path.is_file():
        part = unfinished(f"{key}{suffix}")
        try:
            make(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def unfinished(name: str) -> Path:
    """A path in the cache for something under way. Whatever lies there is removed when the build ends, however it ends."""
    folder, stem = cache_folder(), Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceExhausted(f"cannot write the cache {folder}: {error.strerror}. Set ENGINECAST_CACHE to another folder") from None
    return folder / f"{stem.stem}.{os.getpid()}{stem.suffix}"
