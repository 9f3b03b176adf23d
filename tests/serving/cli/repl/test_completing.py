"""The Tab key."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.cli.repl.completing import Words, completions

WORDS: Words = {
    "/set": lambda: ("seed", "steps", "stop"),
    "/show": lambda: {"settings": 1, "info": 2},
    "/load": None,
    "/quit": None,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b c.png", ".hidden", "deep/a.json", "deep/er/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/s", ["/set ", "/show "]),
        ("/sh", ["/show "]),
        ("/nothing", []),
        ("/set s", ["seed ", "steps ", "stop "]),
        ("/set st", ["steps ", "stop "]),
        ("/set steps ", ["a.png", "b c.png", "deep/"]),
        ("/show ", ["info ", "settings "]),
        ("/load ", ["a.png", "b c.png", "deep/"]),
        ("/load deep/", ["deep/a.json", "deep/er/"]),
        ("/load ./a", ["./a.png"]),
        ("/load .h", [".hidden"]),
        ("what is on ~/a", ["~/a.png"]),
        ("what is on b", ["b c.png"]),
        ("what is on ", []),
        ("what is on nowhere/x", []),
        ("what is on ~nobody-here/x", []),
        ("what is on \0", []),
        ("", []),
    ],
)
def test_completions(line: str, expected: list[str]) -> None:
    assert completions(line, WORDS) == expected


def test_an_absolute_path_is_no_command(folder: Path) -> None:
    assert completions(f"{folder}/de", WORDS) == [f"{folder}/deep/"]
