"""`enginecast bench compare`: two files of rows, or two bundles that are measured in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from profiles.console import notes, out
from profiles.options import SizeOptions, Threads, fitting
from runtime.errors import InvalidInput
from serving.cli.options import with_fields

if TYPE_CHECKING:
    from profiles.rows import Row

REPEAT: Final = 15


@with_fields("sizes", SizeOptions, without=("pictures",))
def compare(
    sizes: SizeOptions,
    first: Annotated[Path, typer.Argument(metavar="A", help="File of rows, or bundle.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    metric: Annotated[list[str] | None, typer.Option(help="Compare only this figure; may be repeated.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Engine that both run on. Of bundles, the default is the one that A would use.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=2, help=f"Repetitions of bundles. Default: {REPEAT}; fewer than 6 show nothing.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Say of each figure whether two files of rows, or two bundles measured in turns, really differ."""
    from profiles.compare import verdicts

    if first.is_dir() != second.is_dir():
        raise InvalidInput("B", "and A are a bundle and a file: expected two bundles, or two files of rows")
    given = {name: value for name, value in asdict(sizes).items() if value is not None}
    if first.is_dir():
        sides = _measured(first, second, target, threads, given, repeat or REPEAT, metric or ())
    else:
        for name in (*given, *(name for name, value in (("repeat", repeat), ("threads", threads)) if value)):
            raise InvalidInput(name, "is how bundles are measured: A and B are files of rows")
        sides = [_read(path, metric or (), target) for path in (first, second)]
    found = verdicts.verdicts(*sides)
    out.print(verdicts.table(found))
    for line in (*map(str, found), *(f"note: {note}" for note in verdicts.notes(found))):
        print(line)


def _read(path: Path, metrics: Sequence[str], target: str | None) -> list[Row]:
    """The rows of a file that are asked for. Raises NotFound, BundleError, InvalidInput."""
    from profiles.rows import read

    rows = [row for row in read(path) if target in (None, row.target)]
    for name in metrics:
        if not any(row.metric == name for row in rows):
            raise InvalidInput("metric", f"'{name}' is not in {path}")
    return [row for row in rows if not metrics or row.metric in metrics]


def _measured(
    first: Path,
    second: Path,
    target: str | None,
    threads: int,
    sizes: Mapping[str, Any],
    repeat: int,
    metrics: Sequence[str],
) -> list[list[Row]]:
    """The rows of both bundles, from one run in turns."""
    from profiles import bench
    from profiles.worker import Job
    from runtime.bundle.manifest import Bundle
    from runtime.placing.loading import choose_target

    bundle, other = Bundle(first), Bundle(second)
    if bundle.manifest.task != other.manifest.task:
        raise InvalidInput("B", f"is a model of task {other.manifest.task}, A of {bundle.manifest.task}")
    settings = fitting(bundle.manifest.task, sizes)
    name = choose_target(bundle, target).target
    workers = [
        bench.bundle_worker(Job(bundle=path, target=name, threads=threads, settings=settings))
        for path in (first, second)
    ]
    found = bench.measured(bundle, workers, bench.BenchPlan(repeat, tuple(metrics)), notes.print)
    return [[row for one, row in found if one is worker] for worker in workers]
