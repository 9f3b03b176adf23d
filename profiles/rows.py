"""Files of measured rows: one schema for every figure, ours or a peer's, `runtime.placing.measured.Row`.

A row can be read alone, years later: it names the metric, the model, the machine, the versions and the repetitions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import BundleError, NotFound, ResourceExhausted
from runtime.files import read_regular
from runtime.placing.measured import LARGEST, parsed
from runtime.placing.measured import Row as Row  # for the modules beside this one


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a file, all or none. Raises ResourceExhausted when the disk is full."""
    data = "".join(f"{row.model_dump_json()}\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        try:
            written = os.write(file, data)  # one write in append mode: rows of two programs do not mix
        except OSError:
            written = -1
        if written != len(data):
            os.ftruncate(file, size)
            raise ResourceExhausted(
                f"{path}: {len(data)} bytes could not be written, nothing was stored: free some disk space"
            )
    finally:
        os.close(file)


def read(path: Path) -> list[Row]:
    """Every row of a file, in order. Raises NotFound, or BundleError naming the line that cannot be read."""
    try:
        lines = read_regular(path, LARGEST).decode().splitlines()
    except OSError as error:
        raise NotFound(
            f"rows {path} cannot be read ({error.strerror}): `enginecast bench --store` writes such files"
        ) from None
    except UnicodeDecodeError:
        raise BundleError(
            f"{path} is no text, expected one row of JSON per line: remove the file or restore it"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parsed(line))
        except ValueError as error:
            raise BundleError(f"{path}, line {number} is no row ({error}): remove or mend that line") from None
    return rows
