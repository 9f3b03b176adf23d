"""Error texts for clients: shortened, without paths of this machine. The log has the full text."""

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
    """The text with at most `length` characters. Lone surrogates, as in file names that are not UTF-8, become question
    marks.
    """
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return cut.encode("utf-8", "replace").decode()


def without_paths(text: str, root: Path, name: str) -> str:
    """The shortened text, in which a model's name replaces the folder of its bundle and "..." every other absolute
    path.
    """
    for known in sorted({str(root), str(root.absolute()), os.path.realpath(root)} - {".", "/"}, key=len, reverse=True):
        text = text.replace(known, name)
    return shortened(PATH.sub("...", text))


def concealed(error: E, root: Path, name: str) -> E:
    """A copy of the error whose text has no paths (`without_paths`)."""
    # Some constructors take the parts of a message, so they are bypassed.
    shown = type(error).__new__(type(error), without_paths(str(error), root, name))
    shown.__dict__.update(error.__dict__)
    return shown
