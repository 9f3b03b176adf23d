"""Rows of figures: what a row holds, where files of rows are, and how they are read.

Files are JSON lines. Some are package data, in profiles/rows; `enginecast bench --store` and `enginecast tune` write
the user's own, in `user_folder`. `runtime.placing.nearest` chooses by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from pydantic import AwareDatetime, Field, ValidationError

from runtime.bundle.manifest import Frozen
from runtime.errors import InvalidInput
from runtime.files import data_folder, read_regular
from runtime.placing.fingerprint import Fingerprint
from runtime.timing import Spread

SHIPPED: Final = Path(__file__).parents[2] / "profiles" / "rows"
LARGEST: Final = 1 << 28
"""Bytes of a file of rows."""


class Row(Frozen):
    """One figure. `metric` is the name of a submodel (its latency), or a name of `profiles.probes` or
    `profiles.score`.
    """

    metric: str
    unit: str
    spread: Spread
    bound: float | None = None
    """The limit that the machine sets, in the same unit: the speed of its memory, or its arithmetic where that was
    measured (`profiles.roofline`). None where neither is known.
    """
    program: str
    """Name and version of what was measured, such as "enginecast 0.1.0"."""
    bundle: str
    source: str
    family: str = ""
    """The family of the source; "" in rows that were stored before it was, and of peers' models that have none."""
    quant: str
    target: str
    device: str
    """The device that really ran, as the engine names it."""
    cpu: str
    threads: int = Field(ge=1)
    settings: Mapping[str, int | float | str] = Field(default_factory=dict)
    """Settings of the measurement: width and height in pixels, steps, tokens, number of cases; shapes of the inputs of
    a submodel's call, such as "2x4x64x64".
    """
    versions: Mapping[str, str]
    date: AwareDatetime
    notes: str = ""
    fingerprint: Fingerprint | None = None
    """The machine; None in rows that were stored before it was."""
    values: tuple[float, ...] = ()
    """The single measurements of `spread`, in order; none in rows that were stored before they were."""
    run: str = ""
    """The same for rows whose measurements were taken in turns, by one command."""

    @property
    def reached(self) -> float | None:
        """The share of the limit that was reached, 1 for all of it; None without a limit."""
        if not self.bound or not self.spread.median:
            return None
        return self.bound / self.spread.median if self.unit == "s" else self.spread.median / self.bound


@dataclass(frozen=True)
class Collected:
    """The rows of several files. `faults` are sentences on what could not be read, which decides nothing."""

    rows: tuple[Row, ...]
    faults: tuple[str, ...] = ()


def user_folder() -> Path:
    """The folder of a user's own rows, in `data_folder`. Raises InvalidInput where the user has no home folder."""
    return data_folder() / "rows"


def default_files() -> list[Path]:
    """All files of rows: first those that come with the program, then the user's own."""
    return [file for folder in _folders() if folder.is_dir() for file in sorted(folder.glob("*.jsonl"))]


def _folders() -> list[Path]:
    """The folders of rows; without a home folder only the program's."""
    try:
        return [SHIPPED, user_folder()]
    except InvalidInput:
        return [SHIPPED]


def collect(files: Iterable[Path]) -> Collected:
    """The rows of all these files. A damaged line must not stop a model from loading: it is left out, and said."""
    found = [_collected(file) for file in files]
    return Collected(
        tuple(row for one in found for row in one.rows), tuple(fault for one in found for fault in one.faults)
    )


def collected(files: Iterable[Path] | None) -> Collected:
    """The rows of these files, of the default ones where it is None."""
    return collect(default_files() if files is None else files)


def _collected(file: Path) -> Collected:
    try:
        stat = file.stat()
        return _parsed(file, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        return Collected((), (f"the rows {file} cannot be read ({error.strerror}): they decide nothing",))


@lru_cache(maxsize=64)
def _parsed(file: Path, size: int, changed: int) -> Collected:
    """The rows of a file of this size that was changed at this time. Raises OSError."""
    rows, faults = list[Row](), list[str]()
    for number, line in enumerate(read_regular(file, LARGEST).decode(errors="replace").splitlines(), start=1):
        try:
            rows.append(parsed(line))
        except ValueError as error:
            faults.append(f"line {number} is no row ({error})")
    if not faults:
        return Collected(tuple(rows))
    more = f", nor are {len(faults) - 1} other lines" if len(faults) > 1 else ""
    return Collected(tuple(rows), (f"rows {file}: {faults[0]}{more}; they decide nothing: remove or mend them",))


def parsed(line: str) -> Row:
    """The row in a line. Raises ValueError that says what is wrong with it."""
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'line'}: {fault['msg']}" for fault in error.errors())
        raise ValueError("; ".join(faults)) from None
