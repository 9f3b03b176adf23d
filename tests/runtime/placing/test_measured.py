"""Where measured rows come from: the program's own and the user's, whatever the working folder is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runtime.errors import InvalidInput
from runtime.files import DATA
from runtime.placing import measured


def no_home() -> Path:
    raise RuntimeError("no home")


def test_rows_of_the_program_and_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    shipped = measured.default_files()
    assert shipped and all(file.parent == measured.SHIPPED for file in shipped)
    own = tmp_path / "data" / "rows" / "mine.jsonl"
    own.parent.mkdir(parents=True)
    own.touch()
    assert measured.default_files() == [*shipped, own]


def test_the_working_folder_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles" / "rows").mkdir(parents=True)
    (tmp_path / "profiles" / "rows" / "strange.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert "strange.jsonl" not in {file.name for file in measured.default_files()}


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_DATA_HOME", "data/enginecast/rows"),
        ("linux", "", "home/.local/share/enginecast/rows"),
        ("darwin", "", "home/Library/Application Support/enginecast/rows"),
        ("win32", "LOCALAPPDATA", "data/enginecast/rows"),
    ],
)
def test_the_user_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, variable: str, expected: str
) -> None:
    for name in (DATA, "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "data"))
    assert measured.user_folder() == tmp_path / expected


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DATA, "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InvalidInput, match=DATA):
        measured.user_folder()
    assert {file.parent for file in measured.default_files()} == {measured.SHIPPED}
