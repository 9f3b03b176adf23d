"""Adds saved styles to prompts, from a file as Automatic1111's web UI has it: styles.csv with the columns name, prompt
and negative_prompt. Where the text of a style has `{prompt}`, the prompt takes its place; else it is put behind it.
"""

from __future__ import annotations

import csv
import io
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from pydantic import BeforeValidator, Field

from runtime.diffusion.wording import drawn_from, reworded
from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.files import read_regular
from runtime.pipeline import Pipeline
from runtime.script import Arguments, Make, Script
from runtime.tasks.image import ImageRequest

PLACE: Final = "{prompt}"
LARGEST: Final = 16 << 20
"""Bytes of the file."""
COLUMNS: Final = ("prompt", "negative_prompt")


def _split(given: Any) -> Any:
    return next(csv.reader([given], skipinitialspace=True), []) if isinstance(given, str) else given


class Names(Arguments):
    """Styles by name, in the order in which they are added: a list, or a text with commas between them."""

    names: Annotated[
        list[str],
        Field(min_length=1, max_length=32, description="styles by name, with commas between them"),
        BeforeValidator(_split),
    ]


class Styles(Script[Names]):
    """Adds styles to the prompts of both passes, and tells what those of the first became."""

    summary: ClassVar[str] = "Add styles of a styles.csv to the prompts."
    takes: ClassVar[type[Arguments]] = Names
    tasks: ClassVar[tuple[str, ...]] = (ImageRequest.task,)

    def open(self, request: ImageRequest, make: Make) -> Pipeline:
        known = self._known()
        for name in self.arguments.names:
            if name not in known:
                raise InvalidInput("scripts.styles.names", f"{quoted(name)} is no style: {did_you_mean(name, known)}")
        styles = [dict(zip(COLUMNS, known[name], strict=True)) for name in self.arguments.names]

        def styled(field: str, prompt: str) -> str:
            return reduce(_with, [style[field.rpartition(".")[2]] for style in styles], prompt)

        changed = reworded(request, styled, styled)
        return drawn_from(make(changed), request, [changed] * request.images)

    def _known(self) -> dict[str, tuple[str, str]]:
        """The texts of each style: for the prompt, and for the negative prompt."""
        if self.folders.styles is None:
            raise InvalidInput("scripts.styles", "needs a file of styles: start the server with --styles FILE")
        return read_styles(self.folders.styles)


def read_styles(file: Path) -> dict[str, tuple[str, str]]:
    """The styles of a file by name: the texts for prompt and negative prompt. Raises InvalidInput."""
    try:
        rows = csv.DictReader(io.StringIO(read_regular(file, LARGEST).decode("utf-8-sig"), newline=""), strict=True)
        if not {"name", *COLUMNS} <= {*(rows.fieldnames or ())}:
            raise InvalidInput("scripts.styles", f"the file of styles has no columns name, {', '.join(COLUMNS)}")
        return {row["name"]: (row["prompt"] or "", row["negative_prompt"] or "") for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput("scripts.styles", f"the file of styles cannot be read: {error}") from None


def _with(prompt: str, style: str) -> str:
    if PLACE in style:
        return style.replace(PLACE, prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)


SCRIPT: Final = Styles
