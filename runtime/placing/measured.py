"""The measured speed of targets on this machine, read from benchmark rows, for choosing a target.

Rows are JSON lines (`profiles.rows.Row`). Some are package data, in profiles/rows; `enginecast bench --store` writes
the user's own, in `user_folder`. Invalid lines are skipped: a damaged row must not stop a model from loading.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from runtime.bundle.manifest import Manifest
from runtime.errors import InvalidInput
from runtime.files import data_folder
from runtime.placing.devices import Machine

SHIPPED: Final = Path(__file__).parents[2] / "profiles" / "rows"
ANSWER_TOKENS: Final = 64
"""Length in tokens of the answer whose time ranks chat models."""


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


def seconds(manifest: Manifest, machine: Machine, files: Iterable[Path]) -> dict[str, float]:
    """Seconds of a picture or of an answer about one, by target, from the newest row of this bundle on this machine."""
    newest: dict[tuple[str, str], tuple[str, float]] = {}
    for row in (row for file in files for row in rows(file)):
        try:
            of = (row["bundle"], row["source"], row["quant"], row["cpu"])
            key, found = (str(row["target"]), str(row["metric"])), (str(row["date"]), float(row["spread"]["median"]))
            here = _is_here(str(row["device"]), machine)
        except (KeyError, TypeError, ValueError):
            continue
        same = of == (manifest.name, manifest.source.name, manifest.quant, machine.host.model)
        if same and here and found[1] > 0 and found > newest.get(key, ("", 0.0)):
            newest[key] = found
    figures: dict[str, dict[str, float]] = {}
    for (target, metric), (_, value) in newest.items():
        figures.setdefault(target, {})[metric] = value
    return {target: whole for target, known in figures.items() if (whole := _whole(known)) is not None}


def _whole(known: Mapping[str, float]) -> float | None:
    if "picture" in known:
        return known["picture"]
    if "first_token" in known and "decode" in known:
        return known["first_token"] + ANSWER_TOKENS / known["decode"]
    return None


def _is_here(device: str, machine: Machine) -> bool:
    """Whether this machine has the device of a row. Devices other than the processor are compared by model name."""
    others = [other for other in machine.devices if other.kind != "cpu"]
    if any(word in device.casefold() for word in ("cuda", "gpu", "npu", "dml", "directml", "coreml", "tensorrt")):
        return any(other.model in device for other in others)
    return True


def in_order(names: Sequence[str], figures: Mapping[str, float]) -> list[str]:
    """The names with those that have figures sorted among themselves, the fastest first. The others keep their
    positions.
    """
    measured = iter(sorted((name for name in names if name in figures), key=lambda name: figures[name]))
    return [next(measured) if name in figures else name for name in names]


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in the lines of a file; without lines that are none."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
