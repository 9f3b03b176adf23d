"""The history of what was typed, across sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.files import DATA
from serving.cli.repl import history
from serving.cli.repl.history import History


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    return tmp_path / "data" / "history" / "talk.jsonl"


def test_lines_are_kept_for_this_user_alone(file: Path) -> None:
    first = History("talk")
    for line in ("one", "two\nlines", "two\nlines", "  ", "x" * 10_001, "drei ü"):
        first.add(line)
    assert History("talk").lines == ["one", "two\nlines", "drei ü"] and not first.problem
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    assert History("talk").lines and file.stat().st_mode & 0o777 == 0o600
    assert History("draw").lines == []


def test_it_is_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 3)
    first = History("talk")
    for i in range(5):
        first.add(str(i))
    assert History("talk").lines == ["2", "3", "4"]
    assert file.read_text().count("\n") == 3 and file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["talk.jsonl"]


def test_damaged_lines_are_left_out(file: Path) -> None:
    History("talk").add("one")
    with file.open("ab") as end:
        end.write(b'"half\n\xff\xfe\n[1]\n"two"\n')
    assert History("talk").lines == ["one", "two"]


def test_a_folder_that_cannot_be_written_is_a_note(file: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    found = History("talk")
    found.add("one")
    assert found.lines == ["one"] and "data" in found.problem
