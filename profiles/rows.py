"""Measured rows: one schema for every figure, ours or a peer's, kept as JSON lines.

Those in `profiles/rows/` are package data; a user's own are in `runtime.placing.measured.user_folder`.

A row can be read alone, years later: it names the metric, the model, the machine, the versions and the repetitions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from pydantic import AwareDatetime, Field, ValidationError

from runtime.bundle.manifest import Frozen
from runtime.errors import BundleError, NotFound, ResourceExhausted
from runtime.files import read_regular
from runtime.placing.fingerprint import Fingerprint
from runtime.timing import Spread


class Row(Frozen):
    """One figure. `metric` is the name of a submodel (its latency), or a name of `profiles.probes` or
    `profiles.score`.
    """

    metric: str
    unit: str
    spread: Spread
    bound: float | None = None
    """The limit that the machine's memory speed sets, in the same unit; None where memory is not the limit."""
    program: str
    """Name and version of what was measured, such as "enginecast 0.1.0"."""
    bundle: str
    source: str
    quant: str
    target: str
    device: str
    """The device that really ran, as the engine names it."""
    cpu: str
    threads: int = Field(ge=1)
    settings: Mapping[str, int | float | str] = Field(default_factory=dict)
    """Settings of the measurement: width and height in pixels, steps, tokens, number of cases."""
    versions: Mapping[str, str]
    date: AwareDatetime
    notes: str = ""
    fingerprint: Fingerprint | None = None
    """The machine; None in rows that were stored before it was."""


LARGEST: Final = 1 << 28
"""Bytes of a file of rows."""


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
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'line'}: {fault['msg']}" for fault in error.errors()
            )
            raise BundleError(f"{path}, line {number} is no row ({faults}): remove or mend that line") from None
    return rows
