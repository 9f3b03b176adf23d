"""Shared by the build side's commands: output, progress, and settings of targets."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import IO, Final

from rich.console import Console

from export.report.progress import Report
from runtime.bundle.manifest import Manifest
from runtime.errors import InvalidInput
from runtime.stopping import STOPPING

out = Console(highlight=False, soft_wrap=True, markup=False)
errors = Console(highlight=False, stderr=True, soft_wrap=True, markup=False)
QUIET: Final = 10.0
"""Seconds without a line, where there is no terminal, after which the step under way is reported again."""


class Show:
    """Prints one line for each step when it is done.

    While a step runs, a terminal gets a line that is rewritten, other outputs a new line every QUIET seconds.
    """

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._number = 0
        self._file: IO[str] = sys.stdout
        self._live_lines = False

    def __call__(self, report: Report) -> None:
        if STOPPING.is_set():
            return
        if report.number != self._number or report.seconds is not None:
            # kept while a step runs: it may redirect the output of libraries that print
            self._number, self._file, self._live_lines = report.number, out.file, out.is_terminal
        head = f"[{report.number:2d}/{report.total}] {report.step.submodel:<16} {report.step.stage:<20}"
        left = f"ETA {duration(report.eta):>8}"
        if report.seconds is not None:
            self._live("")
            self._line(f"{head} {report.seconds:7.1f} s  {left}  {report.detail}".rstrip())
        elif self._live_lines:
            self._live(f"{head} {report.elapsed:7.0f} s  {left}  {report.detail}"[: out.width - 1])
        elif time.monotonic() - self._said >= QUIET:
            self._line(f"{head} {report.elapsed:7.0f} s  {left}  {report.detail} ...".rstrip())

    def _line(self, text: str) -> None:
        self._write(f"{text}\n")
        self._said = time.monotonic()

    def _live(self, text: str) -> None:
        if self._live_lines:
            self._write(f"\r\x1b[2K{text}")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


show = Show()


def duration(seconds: float) -> str:
    """Seconds in words: "45 s", "12 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def show_notes(manifest: Manifest) -> None:
    """How the served model differs from the published checkpoint."""
    for text in manifest.notes:
        out.print(f"note: {text}", markup=False)


def show_table(*rows: Sequence[str]) -> None:
    """Rows of texts, in columns. The first row holds the headings. Only the terminal cuts or wraps."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        out.print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), markup=False)


def settings_of(targets: tuple[str, ...], capability: str, settings: list[str]) -> dict[str, dict[str, str]]:
    """Settings by target. Raises InvalidInput for a text that is not TARGET.NAME=VALUE."""
    found: dict[str, dict[str, str]] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        owner, dot, name = name.partition(".")
        if not (equals and dot and owner and name):
            raise InvalidInput(
                "setting", f"'{text}' is none, expected TARGET.NAME=VALUE such as tensorrt-rtx.workspace=4GiB"
            )
        found.setdefault(owner, {})[name] = value
    if capability:
        for owner in (name for name in targets if name.startswith("tensorrt")):
            found.setdefault(owner, {})["compute_capability"] = capability
    if capability and not any(name.startswith("tensorrt") for name in targets):
        raise InvalidInput("compute-capability", f"is of tensorrt targets, and the targets are {', '.join(targets)}")
    return found
