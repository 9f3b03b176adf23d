"""What the texts say of the program: one name for it, and commands that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import export.cli.commands
import profiles.cli
import serving.cli.commands

ROOT = Path(__file__).parents[1]
FOLDERS = ("calibration", "docs", "examples", "export", "profiles", "proto", "runtime", "serving", "tests")
SUFFIXES = {".md", ".py", ".mjs", ".proto", ".html", ".toml"}
COMMANDS = set(typer.main.get_group(serving.cli.commands.app).commands)


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project with its place."""
    files = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    for file in files:
        if (
            file.suffix in SUFFIXES
            and "node_modules" not in file.parts
            and "enginecast_pb" not in file.parts
            and file != Path(__file__)
        ):
            yield str(file.relative_to(ROOT)), file.read_text()


def test_no_text_calls_the_shells_builtin() -> None:
    """`export X` sets a variable in every shell and says nothing: the program is `enginecast`, or `python -m export`,
    `uv run export`.
    """
    wrong = re.compile(rf"(?<!python -m )(?<!uv run )\bexport ({'|'.join(sorted(COMMANDS))})\b(?! (of|is|in))")
    assert not [f"{name}: {found[0]}" for name, text in texts() for found in wrong.finditer(" ".join(text.split()))]


def test_lines_have_up_to_120_characters() -> None:
    """Of documents and interfaces. Ruff checks Python."""
    long = {(name, line) for name, text in texts() for line in text.splitlines() if len(line) > 120}
    assert not {(name, line) for name, line in long if name.endswith((".md", ".proto", ".toml"))}


def test_every_command_that_is_named_exists() -> None:
    named = re.compile(r"(?:`|^ {4}(?:\$ )?)enginecast ([a-z][a-z-]*)(?=[ `\n])", re.MULTILINE)
    found = {
        (name, command) for name, text in texts() if name.endswith((".md", ".py")) for command in named.findall(text)
    }
    assert len(found) > 20
    assert not {(name, command) for name, command in found if command not in COMMANDS}


@pytest.mark.parametrize("app", [export.cli.commands.app, profiles.cli.app], ids=["export", "profiles"])
def test_enginecast_has_every_command(app: typer.Typer) -> None:
    assert set(typer.main.get_group(app).commands) <= COMMANDS
