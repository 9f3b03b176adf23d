"""What the Tab key makes of the beginning of a word: a command, what a command takes, or the name of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

Words = Mapping[str, Callable[[], Iterable[str]] | None]
"""The commands, and what each takes first; None is the name of a file, or a text."""
MOST: Final = 100
"""The most names of files that are offered."""
BREAKS: Final = " \t\n"
"""What ends a word."""


def completions(line: str, words: Words) -> list[str]:
    """What the last word of a line, up to the cursor, may become."""
    *before, word = line.lstrip().replace("\t", " ").split(" ")
    if not before and word.startswith("/"):
        return sorted(f"{one} " for one in words if one.startswith(word)) or files(word)
    if len(before) == 1 and (known := words.get(before[0])) is not None:
        return sorted(f"{one} " for one in known() if one.startswith(word))
    return files(word) if word or (before[:1] and before[0] in words) else []


def files(word: str) -> list[str]:
    """The files whose names begin so, folders with a slash behind. Hidden ones are offered where a dot is typed."""
    head, _, start = word.rpartition("/")
    typed = f"{head}/" if "/" in word else ""
    try:
        folder = Path(typed or ".").expanduser()
        with os.scandir(folder) as entries:
            found = sorted((one.name, one.is_dir()) for one in entries if one.name.startswith(start))
    except (OSError, RuntimeError, ValueError):  # no such folder, or no such user
        return []
    shown = [(name, inside) for name, inside in found if start.startswith(".") or not name.startswith(".")]
    return [f"{typed}{name}{'/' if inside else ''}" for name, inside in shown[:MOST]]


def bind(readline: Any, words: Words) -> None:
    """Let the Tab key of readline, or of libedit in its place, complete words."""
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            line: str = readline.get_line_buffer()[: readline.get_endidx()]
            found[:] = completions(line, words)
        return found[state] if state < len(found) else None

    readline.set_completer_delims(BREAKS)
    readline.set_completer(complete)
    editline = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
