"""Files that are read again when they change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from runtime.files import file_error, read_regular

log = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int] | None
"""Time of the last change, size and inode of a file; None if it is not there."""


class Watched(Generic[T]):
    """What `read` makes of some files. It is read again when one of them has changed; if that fails, the former value
    is kept, and the log says why. May be used from any thread.

    Raises the error of the first reading.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], T]) -> None:
        self._files = files
        self._read = read
        self._lock = threading.Lock()
        self._stamps = [_stamp(file) for file in files]
        self._value = read()

    def current(self) -> T:
        """The value of the files as they are now. Takes some microseconds if they have not changed."""
        with self._lock:
            stamps = [_stamp(file) for file in self._files]
            if stamps != self._stamps:
                self._stamps = stamps
                self._renew()
            return self._value

    def _renew(self) -> None:
        changed = " and ".join(map(str, self._files))
        try:
            self._value = self._read()
        except Exception as error:
            log.error("%s: the former version stays in use: %s", changed, error)
        else:
            log.info("%s: the new version is in use", changed)


def content(file: Path, limit: int) -> bytes:
    """The content of a file with at most `limit` bytes. Raises NotFound, InvalidInput and the like that say why."""
    try:
        return read_regular(file, limit)
    except OSError as error:
        raise file_error(error) from None


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
