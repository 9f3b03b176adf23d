"""Picture files that a question names: each becomes a picture at its place in the text.

A path may be in quotes, have blanks as they are or behind a backslash, begin with ~ or be a file:// address, as
terminals insert a file that is dragged onto them. What ends as a picture file does and names none is refused: a
question without its picture would get an invented answer. Addresses of the web stay text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from runtime.errors import NotFound, quoted
from serving.cli import terminal
from serving.dialects.python.requests import PictureLike

ENDING: Final = re.compile(
    r"\.(?:png|jpe?g|webp|bmp|gif|tiff?|avif|hei[cf])(?=$|[\s\"'`?!,;:)\]}>]|\.+(?:\s|$))", re.IGNORECASE
)
"""How the names of picture files end, with what may follow in a sentence."""
WORD: Final = re.compile(r"(?:^|(?<=[\s(\[{<`]))(?=\S)")
"""The beginning of a word."""
FOLDER: Final = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]")
"""The beginning of a path that says where it lies: such a one may have blanks."""
ESCAPED: Final = re.compile(r"\\(.)")
SCHEME: Final = "file://"
WORDS: Final = 16
"""A path with blanks has at most so many words."""
LONGEST: Final = 1024
"""Characters of the longest path that is looked for (PATH_MAX of macOS)."""


@dataclass(frozen=True)
class Named:
    """A picture file that a text names from `start` to `end`."""

    start: int
    end: int
    path: Path


def content(question: str) -> tuple[list[str | PictureLike], list[Path]]:
    """A question as texts and pictures in order, and the paths of these. Blanks between pictures, and between one at
    the beginning or end and the text, are left out. Raises NotFound for a file that is missing, InvalidInput for one
    that is no picture.
    """
    found = list(_named(question))
    ends = [0, *(one.end for one in found)]
    texts = [question[start : one.start] for start, one in zip(ends, found, strict=False)] + [question[ends[-1] :]]
    if found and not texts[0].strip():
        texts[:2] = "", texts[1].lstrip()
    if found and not texts[-1].strip():
        texts[-2:] = texts[-2].rstrip(), ""
    parts: list[str | PictureLike] = [texts[0]] if texts[0] else []
    for one, text in zip(found, texts[1:], strict=True):
        parts += [terminal.read_image(one.path), *([text] if text.strip() else [])]
    return parts, [one.path for one in found]


def begins_with_one(text: str) -> bool:
    """Whether a line that begins with / is a question that begins with a picture's path, and no command."""
    word = text.split(maxsplit=1)[0]
    return "/" in word[1:] or ENDING.search(word) is not None


def _named(text: str) -> Iterator[Named]:
    """The picture files that a text names, in order. Raises NotFound."""
    done = 0
    for ending in ENDING.finditer(text):
        end = ending.end()
        begin = max(done, end - LONGEST)
        found = _quoted(text, begin, end) or _plain(text, begin, end)
        if found is not None:
            yield found
            done = found.end


def _quoted(text: str, begin: int, end: int) -> Named | None:
    """The path in quotes that ends here."""
    quote = text[end : end + 1]
    if quote not in ("'", '"'):
        return None
    start = text.rfind(quote, begin, end)
    if start < 0:
        return None
    name = text[start + 1 : end]
    if "://" in name and not name.startswith(SCHEME):
        return None
    return Named(start, end + 1, _existing(name) or _missing(name))


def _plain(text: str, begin: int, end: int) -> Named | None:
    """The path that ends here: the longest of those that exist; else a word, which then has to exist."""
    words = (word.start() for word in WORD.finditer(text, begin, end))
    starts = [start for start in words if text[max(0, start - 2) : start] != "\\ "]  # there the blank is escaped
    folders = [start for start in starts if FOLDER.match(text, start)][-WORDS:]
    for start in [*folders, *starts[-1:]]:
        if (path := _existing(text[start:end])) is not None:
            return Named(start, end, path)
    if not starts or ("://" in (name := text[starts[-1] : end]) and not name.startswith(SCHEME)):
        return None
    if ENDING.match(name):  # the ending alone, as in "what is .png?"
        return None
    return Named(starts[-1], end, _missing(name))


def _existing(name: str) -> Path | None:
    """The file that a text names, as it is or without backslashes; None if there is none."""
    with suppress(OSError, ValueError, RuntimeError):  # too long, a null character, no such user
        return next((path for path in _meant(name) if path.exists()), None)
    return None


def _meant(name: str) -> Iterator[Path]:
    if name.startswith(SCHEME):
        address = urlsplit(name)
        if address.netloc in ("", "localhost"):
            yield Path(unquote(address.path))
        return
    yield Path(name).expanduser()
    if os.sep == "/" and "\\" in name:
        yield Path(ESCAPED.sub(r"\1", name)).expanduser()


def _missing(name: str) -> Path:
    raise NotFound(
        f"{quoted(name)} names a picture, and there is no such file: check the path, put one with blanks in quotes, or "
        "send names as text after /set paths off"
    )
