"""The measuring commands: bench with its own commands, and score. `enginecast bench` and `enginecast score` are
these.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import Progress
from typer.core import TyperGroup

from profiles.cli_forecast import forecast
from profiles.compare.cli import compare
from profiles.console import notes, out
from profiles.options import (
    Forecast,
    LoadOptions,
    PictureTokens,
    SizeOptions,
    Store,
    StoreAt,
    Targets,
    Threads,
    fitting,
    rows_file_of,
)
from profiles.peers.cli import peers
from profiles.report.cli import report
from runtime.errors import EngineUnavailable, InvalidInput, MissingDependency
from serving.cli.options import with_fields

if TYPE_CHECKING:
    from profiles.process import Worker
    from profiles.rows import Row
    from runtime.bundle.manifest import Bundle

REPEAT: Final = 5
DEFAULT: Final = "bundle"
"""The command of `bench` that needs not be named."""


class Bench(TyperGroup):
    """`bench` with its commands, and without a command: a bundle to measure."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named or not args else [DEFAULT, *args])


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
benches = typer.Typer(
    cls=Bench,
    no_args_is_help=True,
    help="Measure a bundle on this machine: `enginecast bench BUNDLE`, whose options `enginecast bench bundle --help` "
    "lists; compare measurements and report them.",
)
app.add_typer(benches, name="bench")
benches.command()(compare)
benches.command()(report)
benches.command()(peers)


@benches.command(DEFAULT)
@with_fields("sizes", SizeOptions)
@with_fields("load", LoadOptions)
def bench(
    sizes: SizeOptions,
    load: LoadOptions,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder made by `enginecast build`.")],
    target: Targets = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Repetitions that count; one more is made first. Default: 5.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "--submodel",
            help="Measure only this: a submodel, picture, first_token, prefill or decode; may be repeated.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="quick|full",
            help="Measure everything: also requests together, cold and warm loads, servers under load. Quick takes one "
            "to two minutes for a sample.",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Command of another worker to measure in turns (profiles/protocol.py).")
    ] = None,
    threads: Threads = 0,
    store: Store = False,
    rows_file: StoreAt = None,
) -> None:
    """Measure a bundle on its targets in turns, each in a process of its own: medians, spread, memory."""
    from profiles import bench as measuring
    from profiles.process import Worker
    from profiles.rows import append
    from profiles.worker import Job
    from runtime.bundle.manifest import Bundle

    opened = Bundle(bundle)
    settings = fitting(opened.manifest.task, asdict(sizes))
    stored = rows_file_of(store, rows_file)
    load.check(metric, target, sizes.pictures)
    beside_it = [Worker(_command(command)) for command in beside or ()]
    if suite is not None:
        given = {"serve": load.serve, "metric": metric, "repeat": repeat, "beside": beside}
        rows = _bench_suite(opened, suite, given, target, threads, settings)
    elif load.serve:
        rows = _bench_served(opened, load, target, threads, settings, repeat or REPEAT, beside_it)
    else:
        jobs = [
            Job(bundle=bundle, target=name, threads=threads, settings=settings) for name in _targets(opened, target)
        ]
        workers = [*map(measuring.bundle_worker, jobs), *beside_it]
        plan = measuring.BenchPlan(repeat or REPEAT, tuple(metric or ()))
        rows = measuring.bench(opened, workers, plan, notes.print)
        out.print(measuring.table(rows))
    if stored is not None:
        append(stored, rows)


@benches.command()
def roofline(target: Targets = None, threads: Threads = 0, store: Store = False, rows_file: StoreAt = None) -> None:
    """Measure this machine's limits: how fast it reads memory, and a large product on each target and precision."""
    from profiles import bench as measuring
    from profiles.roofline import rates
    from profiles.rows import append

    stored = rows_file_of(store, rows_file)
    rows = rates.roofline(_usable(target), threads, notes.print)
    out.print(measuring.table(rows))
    if stored is not None:
        append(stored, rows)


def _usable(names: Sequence[str] | None) -> list[str]:
    """The targets that are named, else all that this machine can use. Raises EngineUnavailable, NotFound."""
    from runtime.engine import target, targets

    for name in names or ():
        if not (found := target(name).available()).usable:
            raise EngineUnavailable(f"target {name} cannot be used here: {found.reason}")
    return list(names or (name for name, engine in targets().items() if engine.available().usable))


def _bench_suite(
    bundle: Bundle,
    name: str,
    given: Mapping[str, Any],
    target: Sequence[str] | None,
    threads: int,
    settings: Mapping[str, Any],
) -> list[Row]:
    """Measure everything that a suite has. Raises InvalidInput for options that a suite decides itself."""
    from profiles import bench as measuring
    from profiles import suites
    from profiles.serving import bench as serving

    for option in (option for option, value in given.items() if value):
        raise InvalidInput(option, "and --suite exclude each other: a suite decides what is measured, and how often")
    chosen = suites.suite_of(bundle, name)
    subject = suites.Subject(bundle, _targets(bundle, target), threads, settings)
    rows = suites.measure(subject, chosen, notes.print)
    served = [row for row in rows if row.metric.startswith(serving.SERVED)]
    out.print(measuring.table([row for row in rows if row not in served]))
    if served:
        out.print(serving.table(served))
    return rows


def _bench_served(
    bundle: Bundle,
    load: LoadOptions,
    target: Sequence[str] | None,
    threads: int,
    settings: Mapping[str, Any],
    repeat: int,
    beside: Sequence[Worker],
) -> list[Row]:
    """Measure a server of the bundle on each target, or the one at an address."""
    from profiles.serving import bench as measuring
    from profiles.serving.worker import Job

    plan = measuring.LoadPlan(load.loads(), repeat)
    where: dict[str, Any] = {"bundle": bundle.root, "settings": settings, "model": load.model or ""}
    if load.address:
        jobs = [Job(**where, address=load.address)]
    else:
        jobs = [Job(**where, target=name, threads=threads, parallel=load.most) for name in _targets(bundle, target)]
    rows = measuring.bench(bundle, [*map(measuring.server_worker, jobs), *beside], plan, notes.print)
    out.print(measuring.table(rows))
    return rows


def _targets(bundle: Bundle, names: Sequence[str] | None) -> list[str]:
    """The targets to measure: all of the bundle if none is named. Raises EngineUnavailable, InvalidInput."""
    from runtime.placing.loading import choose_target

    wanted: Sequence[str | None] = names or bundle.targets or [None]  # of a bundle built for nothing, choosing says so
    return [choose_target(bundle, name).target for name in wanted]


@app.command()
def score(
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="BUNDLE...", help="Folders made by `enginecast build` from a sample.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Checkpoint folder to score first, in plain diffusers or transformers.")
    ] = None,
    target: Targets = None,
    ability: Annotated[
        str,
        typer.Option(metavar="NAME", help="What to score in place of the checkpoint's usual exam, such as inpainting."),
    ] = "",
    count: Annotated[int | None, typer.Option(min=1, help="Held-out cases. Default: what the exam has.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of a picture. Default: the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance of pictures. Default: the model's.")
    ] = None,
    forecast: Forecast = None,
    batch: Annotated[int | None, typer.Option(min=1, max=32, help="Pictures drawn together. Default: 16.")] = None,
    picture_tokens: PictureTokens = None,
    threads: Threads = 0,
    store: Store = False,
    rows_file: StoreAt = None,
) -> None:
    """Score models on the exam of their checkpoint: the source and each bundle on each target, on the same cases."""
    try:
        from profiles import score as scoring
        from profiles import subjects
    except ImportError as error:
        raise MissingDependency(error.name or "opencv-python-headless", "export") from None
    from profiles.rows import append
    from runtime.engine import Options

    if not bundles and source is None:
        raise InvalidInput("BUNDLE", "is missing: name at least one bundle, or a checkpoint with --source")
    task = subjects.task_of(source, bundles or ())
    given = {"steps": steps, "guidance_scale": guidance_scale, "forecast": forecast, "batch": batch}
    options = fitting(task, given | {"picture_tokens": picture_tokens})
    stored = rows_file_of(store, rows_file)
    exam = subjects.exam_of(source, bundles or (), ability)
    scored = exam.abilities[ability] if ability else exam
    setting = subjects.task_exam(task).settings(source, bundles or (), count or scored.size, options)
    engines = Options(threads=threads)
    results = []
    for subject in subjects.subjects(source, bundles or (), target or (), engines, exam.additions):
        with Progress(console=notes, disable=not notes.is_terminal, transient=True) as bar:
            line = bar.add_task(f"{subject.name} {subject.quant} {subject.target}", total=setting.count)
            scores = scoring.score(subject, scored, setting, partial(bar.advance, line))
        notes.print(
            f"{subject.name} {subject.quant} on {subject.target}: {scores.right:.1f} % right in {scores.seconds:.0f} s"
        )
        results.append((subject, scores))
        if stored is not None:
            append(stored, scoring.rows(subject, setting, scores, threads, ability))
    out.print(scoring.table(results))


app.command()(forecast)


def _command(text: str) -> Sequence[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidInput("beside", f"is no command: {error}") from None
    if not words:
        raise InvalidInput("beside", "is empty, expected the command of a worker")
    return words
