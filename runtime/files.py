"""Files that are whole or not there: written under another name first, in folders that vanish with the process that fills them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO, Final

from runtime.errors import ResourceExhausted

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
JANITOR: Final = """
import pathlib, shutil, sys
sys.stdin.read()
folder, *patterns = sys.argv[1:]
shutil.rmtree(folder, ignore_errors=True)
for pattern in patterns:
    path = pathlib.Path(pattern)
    for found in path.parent.glob(path.name):
        found.unlink(missing_ok=True)
"""
"""Waits for the end of its input, which also comes when the process is killed, and removes the folder and files like these patterns."""


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only once it is complete. Raises ResourceExhausted when the disk is full."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        if error.errno in FULL:
            raise ResourceExhausted(f"the disk filled up while writing {path}: free some space or choose another folder") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def vanishing(parent: Path, prefix: str, *patterns: str) -> Iterator[Path]:
    """A new folder in `parent` that is gone when the block ends, however it ends, SIGKILL included, unless it was renamed.

    So are files whose paths match `patterns`. Raises OSError when the folder cannot be made.
    """
    folder = Path(mkdtemp(prefix=prefix, dir=parent))
    janitor = subprocess.Popen([sys.executable, "-c", JANITOR, str(folder), *patterns], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        janitor.communicate()


def cache_folder() -> Path:
    """Where what can be made again is kept: $ENGINECAST_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginecast"
    return Path(os.environ.get("ENGINECAST_CACHE") or default)


def key_of(*facts: Any) -> str:
    """Hex sha256 of JSON-serialisable facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
