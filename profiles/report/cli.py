"""`enginecast bench report`: measured rows as one page and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiles.console import notes
from runtime.errors import InvalidInput, NotFound
from runtime.placing.measured import default_files


def report(
    rows: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[ROWS|FOLDER]...",
            help="Files of rows, or folders of them. Default: those that come with the program, and the user's own.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page; plots are put beside it.")] = Path(
        "report.html"
    ),
    source: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Show only this model; may be repeated.")
    ] = None,
) -> None:
    """Write measured rows as one page that needs no network, with plots, and the plots as PNG files (extra plots)."""
    from profiles.report import page
    from profiles.roofline.rates import MACHINE
    from profiles.rows import read

    found = [row for file in _files(rows or ()) for row in read(file)]
    names = sorted({row.source for row in found})
    for name in source or ():
        if name not in names:
            raise InvalidInput("source", f"'{name}' is in no row: there are {', '.join(names) or 'none'}")
    shown = [row for row in found if not source or row.source in (*source, MACHINE)]
    if not shown:
        raise NotFound("there are no rows to report: `enginecast bench BUNDLE --store` makes some")
    for path in page.write(shown, output):
        notes.print(f"{path}")


def _files(paths: list[Path] | tuple[Path, ...]) -> list[Path]:
    """The files named, and those in the folders named; the usual ones where none is. Raises NotFound."""
    if not paths:
        return default_files()
    found = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise NotFound(f"{path} has no files of rows (*.jsonl): `enginecast bench --store` writes such files")
        found += files
    return found
