"""Draws words of prompts from lists: `__colour__` becomes a line of the file colour.txt in the folder of wildcards.

Which line is drawn follows from the seed of the picture, the name, and how many were drawn before. Each picture of a
request draws its own, so that it equals one that is requested alone with its seed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final

from runtime import limits
from runtime.diffusion.sequence import in_turn
from runtime.diffusion.wording import drawn_from, reworded
from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.files import read_regular
from runtime.pipeline import Pipeline
from runtime.script import Arguments, Make, Script
from runtime.tasks.image import ImageRequest

WILDCARD: Final = re.compile(r"__([\w-]+(?:[./][\w-]+)*?)__")
MOST: Final = 1000
"""Lines drawn for one prompt, those in drawn lines included."""
DEEPEST: Final = 10
"""How deep wildcards may be in lines of other wildcards."""
LARGEST: Final = 16 << 20
"""Bytes of a file."""


class Wildcards(Script[Arguments]):
    """Expands the wildcards of prompts, and tells what those of the first pass became. A second pass with prompts of
    its own draws anew: equal prompts become equal ones.
    """

    summary: ClassVar[str] = "Replace __name__ in prompts by a line of the file name.txt, chosen by the seed."
    tasks: ClassVar[tuple[str, ...]] = (ImageRequest.task,)

    def open(self, request: ImageRequest, make: Make) -> Pipeline:
        seed = secrets.randbits(32) if request.seed is None else request.seed
        files = self._files()
        parts = [self._part(request, seed, index, files) for index in range(request.images)]
        return drawn_from(in_turn(make, parts), request, parts)

    def _part(self, request: ImageRequest, seed: int, index: int, files: Mapping[str, Path]) -> ImageRequest:
        """The request of one picture."""
        first, second = (_Drawing(seed + index, files).expanded for _ in range(2))
        return reworded(request.single(index, seed), first, second)

    def _files(self) -> dict[str, Path]:
        """The files by the names that prompts have for them. Names of a request only choose among these."""
        folder = self.folders.wildcards
        if folder is None:
            raise InvalidInput(
                "scripts.wildcards", "needs a folder of wildcards: start the server with --wildcards DIR"
            )
        return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.txt"))}


class _Drawing:
    """The lines drawn for one picture."""

    def __init__(self, seed: int, files: Mapping[str, Path]) -> None:
        self._seed, self._files = seed, files
        self._lines: dict[str, list[str]] = {}
        self._drawn = 0

    def expanded(self, field: str, prompt: str, depth: int = 0) -> str:
        """The prompt without wildcards. Raises InvalidInput that names the field."""
        if depth > DEEPEST:
            raise InvalidInput(field, f"has wildcards in wildcards, more than {DEEPEST} deep: does one contain itself?")
        found = WILDCARD.sub(lambda match: self.expanded(field, self._line(field, match[1]), depth + 1), prompt)
        limits.PROMPT.length(field, found)
        return found

    def _line(self, field: str, name: str) -> str:
        self._drawn += 1
        if self._drawn > MOST:
            raise InvalidInput(field, f"needs more than {MOST:,} lines of wildcards, expected fewer")
        lines = self._lines.get(name) or self._lines.setdefault(name, self._read(field, name))
        drawn = hashlib.sha256(f"{self._seed} {name} {self._drawn}".encode()).digest()
        return lines[int.from_bytes(drawn) % len(lines)]

    def _read(self, field: str, name: str) -> list[str]:
        if name not in self._files:
            raise InvalidInput(field, f"has the wildcard {quoted(name)}, of which there is no file: "
                f"{did_you_mean(name, self._files)}")  # fmt: skip
        try:
            text = read_regular(self._files[name], LARGEST).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise InvalidInput(field, f"has the wildcard {quoted(name)}, whose file is no UTF-8 text of at most "
                f"{LARGEST:,} bytes that can be read") from None  # fmt: skip
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not lines:
            raise InvalidInput(field, f"has the wildcard {quoted(name)}, whose file has no lines")
        return lines


SCRIPT: Final = Wildcards
