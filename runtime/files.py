"""Writing files and folders atomically, reading regular files of bounded size, and explaining errors of the system."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO, Final

from runtime.errors import EnginecastError, InvalidInput, NotFound, ResourceExhausted

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
ADVICE: Final = {
    **dict.fromkeys(FULL, "Free some space there, or choose another folder"),
    errno.EFBIG: "Allow larger files there (ulimit -f), or choose another folder",
    errno.EACCES: "Give this user the right to it, or choose another",
    errno.EPERM: "Give this user the right to it, or choose another",
    errno.EROFS: "Choose a folder that can be written",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Remove the links that lead back to themselves",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENOMEM: "Free some memory",
}
"""Advice by errno. Other errors are clear from the system's own message."""
CACHE_ADVICE: Final = "Set ENGINECAST_CACHE to a folder that this user can write, with room"
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
"""Waits for the end of its input, which also comes when the parent process is killed, then removes the folder and all
files that match the patterns.
"""


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Write a file that gets its name only when it is complete. Raises ResourceExhausted if the disk is full."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        if error.errno in FULL:
            raise ResourceExhausted(
                f"the disk filled up while writing {path}: free some space or choose another folder"
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def vanishing(parent: Path, prefix: str, *patterns: str) -> Iterator[Path]:
    """A new folder in `parent` that is removed when the block ends, even by SIGKILL, unless it was renamed.

    Files whose paths match `patterns` are removed too. Raises OSError if the folder cannot be made.
    """
    folder = Path(mkdtemp(prefix=prefix, dir=parent))
    janitor = subprocess.Popen(
        [sys.executable, "-c", JANITOR, str(folder), *patterns], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield folder
    finally:
        janitor.communicate()


class TooLarge(OSError):
    """A file is larger than valid files of its kind."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for pipes and devices, which could block or never end.

    The file is checked again after opening, which does not block: it may have been replaced meanwhile.
    """
    _require_regular(path, path.stat())
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        _require_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a file", str(path))


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file. Raises OSError, also if it has more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLarge(errno.EINVAL, f"it has more than {limit:,} bytes, which no such file has", str(path))
    return content


def append(path: Path, text: str, mode: int) -> None:
    """Append to a file, made with the permissions `mode` if there is none. Raises OSError, also for a pipe that nobody
    reads, at which opening would wait.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def strict_json(content: bytes) -> Any:
    """Parse JSON (RFC 8259, UTF-8). Raises ValueError for content that parsers treat differently: a repeated name, NaN,
    infinity, deep nesting.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} stands in it twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:80]} is too large a number")
    return number


OTHERS: Final[tuple[tuple[tuple[bytes, ...], str], ...]] = (
    (
        (b"version https://git-lfs.github.com/spec/",),
        "is a git-lfs pointer, which stands for a file that was not fetched: run `git lfs pull` in its folder, or "
        "download the file itself",
    ),
    (
        (b"<!doctype html", b"<html"),
        "is a web page, not the file that its name says: download the file itself (on the hub, its address has "
        "/resolve/, not /blob/)",
    ),
    (
        (b"pk\x03\x04", b"\x80\x02"),
        "is a pickle in spite of its name, which can run code when it is read, and is refused: take safetensors",
    ),
    (
        (b"gguf",),
        "is a GGUF file, which holds weights that are quantized already: take the checkpoint that it was made from",
    ),
)
"""Wrong contents of files, by their first bytes (in lower case)."""


def other_content(head: bytes) -> str:
    """Describe a file with these first bytes that is not JSON, text or safetensors, with advice; "" if it is none of
    `OTHERS`.
    """
    beginning = head.lstrip()[:64].lower()
    return next((what for starts, what in OTHERS if beginning.startswith(starts)), "")


def file_error(error: OSError) -> EnginecastError:
    """Convert an error of the system about a file: which file, what was wrong, what to do."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) and not names:
        return NotFound(f"{reason}: was the current folder removed?")
    advice = CACHE_ADVICE if names and _in_cache(names[-1]) else ADVICE.get(error.errno or 0, "")
    message = ". ".join(filter(None, (f"{' to '.join(names) or 'a file, or standard output'}: {reason}", advice)))
    if error.errno in (*FULL, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM) or advice == CACHE_ADVICE:
        return ResourceExhausted(message)
    return NotFound(message) if isinstance(error, FileNotFoundError) else InvalidInput("file", message)


def _in_cache(name: str) -> bool:
    try:
        return Path(name).is_relative_to(cache_folder())
    except InvalidInput:
        return False


CACHE: Final = "ENGINECAST_CACHE"
"""The environment variable that names another folder for caches."""


def cache_folder() -> Path:
    """The cache folder, whose content can be made again: $ENGINECAST_CACHE, else the user's cache folder. Raises
    InvalidInput if there is neither.
    """
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginecast"
    except RuntimeError:
        raise InvalidInput(
            CACHE, "is not set and this user has no home folder: set it to a folder for caches"
        ) from None


DATA: Final = "ENGINECAST_DATA"
"""The environment variable that names another folder for the user's data."""


def data_folder() -> Path:
    """The folder of a user's data: $ENGINECAST_DATA, else `enginecast` in the platform's folder for user data.

    That is $XDG_DATA_HOME or ~/.local/share on Linux (XDG Base Directory Specification), ~/Library/Application Support
    on macOS and %LOCALAPPDATA% on Windows. Raises InvalidInput where the user has no home folder.
    """
    if chosen := os.environ.get(DATA):
        return Path(chosen)
    try:
        return _user_data() / "enginecast"
    except RuntimeError:
        raise InvalidInput(DATA, "is not set and this user has no home folder: set it to a folder for data") from None


def _user_data() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")


def key_of(*facts: Any) -> str:
    """Hex sha256 of JSON-serialisable facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
