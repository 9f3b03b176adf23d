"""What clients get to read of an error: no paths of this machine, and not without end. The log has it whole."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, TypeVar

from runtime import limits
from runtime.errors import EnginecastError

E = TypeVar("E", bound=EnginecastError)
PATH: Final = re.compile(r"(?<![\w.~:/\\-])(?:~|[A-Za-z]:)?[/\\][^\s'\":;,()<>|]+")
"""An absolute path in a text, up to a space or what texts put around paths."""


def shortened(text: str, length: int = limits.ERROR_TEXT.most) -> str:
    """The text, cut where it is longer; half surrogates, as in names of files that are no UTF-8, become
    question marks.
    """
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return cut.encode("utf-8", "replace").decode()


def without_paths(text: str, root: Path, name: str) -> str:
    """The text, shortened, with the name of a model for the folder of its bundle and "..." for every other absolute
    path.
    """
    for known in sorted({str(root), str(root.absolute()), os.path.realpath(root)} - {".", "/"}, key=len, reverse=True):
        text = text.replace(known, name)
    return shortened(PATH.sub("...", text))


def concealed(error: E, root: Path, name: str) -> E:
    """The same error with the text that `without_paths` makes of its own."""
    shown = type(error).__new__(
        type(error), without_paths(str(error), root, name)
    )  # constructors take the parts of a message
    shown.__dict__.update(error.__dict__)
    return shown
