from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from profiles import rows
from profiles.rows import Row
from runtime.errors import BundleError, NotFound, ResourceExhausted
from runtime.timing import Spread

COMMITTED = Path(rows.__file__).parent / "rows"


def row(**changes: Any) -> Row:
    fields: dict[str, Any] = {
        "metric": "unet", "unit": "s", "spread": Spread.of([2.0, 1.0, 4.0]), "program": "enginecast 1", "bundle": "b",
        "source": "s",
        "quant": "int8", "target": "openvino", "device": "CPU", "cpu": "x", "threads": 2, "settings": {"width": 512,
            "sampler": "ddim"},
        "versions": {"numpy": "2"}, "date": datetime(2026, 1, 2, tzinfo=UTC), "notes": "a line\nand another",
    }  # fmt: skip
    return Row(**fields | changes)


def test_appended_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows.append(path, [row()])
    rows.append(path, [row(bound=3.5), row(metric="decode")])
    assert rows.read(path) == [row(), row(bound=3.5), row(metric="decode")]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text + "{}\n", "line 3 is no row .*metric: Field required"),
        (lambda text: text.replace('"threads":2', '"threads":0', 1), "line 1 is no row .*threads"),
        (lambda text: text[:-20], "line 2 is no row .*line: Invalid JSON"),
        (lambda text: text.replace('"unit"', '"unity"', 1), "line 1 is no row .*unity"),
    ],
)
def test_a_spoilt_line_is_named(tmp_path: Path, spoil: Callable[[str], str], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    rows.append(path, [row(), row()])
    path.write_text(spoil(path.read_text()))
    with pytest.raises(BundleError, match=message):
        rows.read(path)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="enginecast bench --store"):
        rows.read(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="is no text"):
        rows.read(tmp_path / "binary.jsonl")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    rows.append(path, [row()])
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with pytest.raises(ResourceExhausted, match="nothing was stored"):
        rows.append(path, [row()])
    monkeypatch.undo()
    assert rows.read(path) == [row()]


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_rows_can_be_read(path: Path) -> None:
    assert rows.read(path)
