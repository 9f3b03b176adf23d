"""Nothing half written, nothing left behind: a build happens in a hidden folder that becomes the output by one rename,
or vanishes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, NamedTuple

from runtime.bundle.manifest import MANIFEST
from runtime.errors import InvalidInput, ResourceExhausted
from runtime.files import FULL, vanishing
from runtime.files import cache_folder as cache_folder  # for the modules beside this one
from runtime.files import key_of as key_of


class Result(NamedTuple):
    """A kind of folder that is written: the file that each has, and its name in messages."""

    mark: str
    name: str


BUNDLE: Final = Result(MANIFEST, "bundle")
GRAPHS: Final = Result("graphs.json", "folder of graphs")


@contextmanager
def staging(output: Path, force: bool, kind: Result = BUNDLE) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place when the block ends well and is removed otherwise, even after
    SIGKILL. A folder of another `kind` is never replaced.

    Raises InvalidInput when `output` exists and is not ours to replace, ResourceExhausted when the disk is full.
    """
    check_place(output, kind)
    if output.exists() and any(output.iterdir()) and not force:
        raise InvalidInput(
            "output", f"{output} holds another {kind.name}: choose another folder, or replace it with --force"
        )
    with ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            unfinished = (str(cache_folder() / name) for name in (f"*.{os.getpid()}", f"*.{os.getpid()}.*"))
            folder = stack.enter_context(vanishing(output.parent, f".{output.name}.building-", *unfinished))
        except OSError as error:
            raise ResourceExhausted(
                f"cannot write beside {output}: {error.strerror}. Choose another --output"
            ) from None
        try:
            yield folder
            folder.chmod(0o755)
            _replace(folder, output)
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = f"{output.parent} or the cache {cache_folder()}"
            raise ResourceExhausted(
                f"the disk of {where} is full: free some space, choose another --output or set ENGINECAST_CACHE"
            ) from None


def check_place(output: Path, kind: Result = BUNDLE) -> None:
    """Raise InvalidInput when something lies at `output` that is no result of this `kind`, ResourceExhausted when
    nothing can be written there.
    """
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / kind.mark).is_file())):
        raise InvalidInput("output", f"{output} exists and is no {kind.name}: choose another folder")
    check_writable(output)


def check_writable(output: Path) -> None:
    """Raise ResourceExhausted unless a file or folder of this name can be made, with the folders above it."""
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ResourceExhausted(f"cannot write beside {output}: {above} is no folder. Choose another --output")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ResourceExhausted(
            f"cannot write beside {output}: folder {above} is not yours to write. Choose another --output"
        )


def _replace(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`. What was there is moved aside first and removed last, so that one of the two is
    always whole.
    """
    if not output.exists():
        folder.rename(output)
        return
    aside = Path(mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    output.rename(aside / output.name)
    folder.rename(output)
    shutil.rmtree(aside, ignore_errors=True)


def cached(key: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """The file kept under `key`; made by `make(path)` when it is not there yet, or damaged, as after a loss
    of power.
    """
    path = cache_folder() / f"{key}{suffix}"
    if not _whole(path):
        part = unfinished(f"{key}{suffix}")
        try:
            make(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _whole(path: Path) -> bool:
    """Whether there is a file that is not empty and, of JSON, can be read."""
    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        return path.suffix != ".json" or json.loads(path.read_bytes()) is not None
    except ValueError:
        return False


def unfinished(name: str) -> Path:
    """A path in the cache for something under way. Whatever lies there is removed when the build ends,
    however it ends.
    """
    folder, stem = cache_folder(), Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceExhausted(
            f"cannot write the cache {folder}: {error.strerror}. Set ENGINECAST_CACHE to another folder"
        ) from None
    return folder / f"{stem.stem}.{os.getpid()}{stem.suffix}"
