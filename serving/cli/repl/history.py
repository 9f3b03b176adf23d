"""The lines that were typed before, kept in the user's data folder: a string of JSON each, for this user alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from runtime.errors import EnginecastError
from runtime.files import append, data_folder, file_error, read_regular, written

MOST: Final = 1000
"""Lines that are kept."""
LONGEST: Final = 10_000
"""Characters of a line that is kept."""
BYTES: Final = 64 << 20
"""A larger file is none of ours."""
PRIVATE: Final = 0o600


class History:
    """Lines of earlier sessions, the oldest first, and those that `add` appends. `problem` says why the file cannot be
    read or written; lines are then kept for this session alone.
    """

    def __init__(self, name: str) -> None:
        self.lines: list[str] = []
        self.problem = ""
        self._path: Path | None = None
        try:
            folder = data_folder() / "history"
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{name}.jsonl"
            self.lines = self._read(self._path)
        except OSError as error:
            self._give_up(file_error(error))
        except EnginecastError as error:
            self._give_up(error)

    def add(self, line: str) -> None:
        """Keep a line, unless it is empty, too long, or the last one again."""
        if not line.strip() or len(line) > LONGEST or line in self.lines[-1:]:
            return
        self.lines.append(line)
        if self._path is not None:
            try:
                append(self._path, _row(line), PRIVATE)
            except OSError as error:
                self._give_up(file_error(error))

    def _read(self, path: Path) -> list[str]:
        """The last lines of a file, which is cut to them. Raises OSError."""
        if not path.exists():
            return []
        path.chmod(PRIVATE)
        found = list(_lines(read_regular(path, BYTES)))
        if len(found) > MOST:
            _write(path, found[-MOST:])
        return found[-MOST:]

    def _give_up(self, error: EnginecastError) -> None:
        self.problem, self._path = str(error), None


def _row(line: str) -> str:
    return json.dumps(line) + "\n"


def _lines(content: bytes) -> Iterator[str]:
    """The lines of a file; what is no string of JSON, such as one that was half written, is left out."""
    for row in content.splitlines():
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, str):
            yield line


def _write(path: Path, lines: Sequence[str]) -> None:
    with written(path) as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), PRIVATE)
        file.write("".join(map(_row, lines)).encode())
