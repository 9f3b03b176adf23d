"""What the build side's commands share: where they print, how they show progress, how they read a target's settings."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

from rich.console import Console

from runtime.bundle import Manifest
from runtime.errors import InvalidInput

out = Console(highlight=False, soft_wrap=True)
errors = Console(highlight=False, stderr=True, soft_wrap=True)


def terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def show(report: Any) -> None:
    """One line a step when it is done; on a terminal also a line that says what runs now."""
    head = f"[{report.number:2d}/{report.total}] {report.step.submodel:<16} {report.step.stage:<20}"
    if report.seconds is None:
        if out.is_terminal:
            out.print(f"{head} ... ETA {report.eta:.0f} s  {report.detail:<24}", end="\r")
        return
    out.print(f"{head} {report.seconds:7.1f} s  ETA {report.eta:4.0f} s  {report.detail}")


def note(what: str, number: int, total: int) -> None:
    """On a terminal, how far a step is."""
    if out.is_terminal:
        out.print(f"{what} {number} of {total}", end="\r")


def show_notes(manifest: Manifest) -> None:
    """What of the checkpoint is served otherwise than published."""
    for text in manifest.notes:
        out.print(f"note: {text}", markup=False)


def show_table(*rows: Sequence[str]) -> None:
    """Rows of as many texts each, in columns. The first are the headings; nothing is cut or wrapped but by the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        out.print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), markup=False)


def settings_of(targets: tuple[str, ...], capability: str, settings: list[str]) -> dict[str, dict[str, str]]:
    """Settings by target. Raises InvalidInput for what is no TARGET.NAME=VALUE."""
    found: dict[str, dict[str, str]] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        owner, dot, name = name.partition(".")
        if not (equals and dot and owner and name):
            raise InvalidInput("setting", f"'{text}' is none, expected TARGET.NAME=VALUE such as tensorrt-rtx.workspace=4GiB")
        found.setdefault(owner, {})[name] = value
    if capability:
        for owner in (name for name in targets if name.startswith("tensorrt")):
            found.setdefault(owner, {})["compute_capability"] = capability
    if capability and not any(name.startswith("tensorrt") for name in targets):
        raise InvalidInput("compute-capability", f"is of tensorrt targets, and the targets are {', '.join(targets)}")
    return found
