"""The measuring commands: bench and score. `enginecast bench` and `enginecast score` are these."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import Progress

from calibration.ground import machine
from runtime.errors import InvalidInput, MissingDependency
from runtime.placing.measured import user_folder
from serving.cli.options import with_fields
from serving.settings import Settings

if TYPE_CHECKING:
    from profiles.bench import Worker
    from profiles.rows import Row
    from profiles.serving.load import Load
    from runtime.bundle.manifest import Bundle

WIDTH: Final = 160
"""Of tables that do not go to a terminal, in characters."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
notes = Console(highlight=False, stderr=True)

Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Engine to run on; repeat for several. Default: all of the bundle.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads per engine, 0 = all cores.")]
Store = Annotated[bool, typer.Option("--store", help="Append the rows to a file.")]
StoreAt = Annotated[
    Path | None, typer.Option("--rows", help="That file. Default: rows/PROCESSOR.jsonl in the user's data folder.")
]

CLIENTS: Final = (1, 2, 4, 8)
"""Of closed loads, where no load is given."""
EACH: Final = 4
"""Requests of each client."""
ARRIVING: Final = 32
"""Requests of an open load."""


@dataclass(frozen=True)
class SizeOptions:
    """Options of `bench` on what is measured of the models of a task."""

    width: Annotated[int | None, typer.Option(min=1, help="Width of pictures in pixels.")] = None
    height: Annotated[int | None, typer.Option(min=1, help="Height of pictures in pixels.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of a whole picture.")] = None
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the text prompt that prefill and decode begin with. Default: 512."),
    ] = None
    new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to decode. Default: 64.")] = None
    pictures: Annotated[
        bool | None, typer.Option("--pictures", help="With --serve, each question is about a picture of its own.")
    ] = None


@dataclass(frozen=True)
class LoadOptions:
    """Options of `bench --serve`."""

    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Measure a server of the bundle under load: throughput, and seconds to the first output."
        ),
    ] = False
    clients: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=256, help="Closed load: so many clients, each with one request at a time; may be repeated. "
            "Default: 1, 2, 4 and 8.",
        ),
    ] = None  # fmt: skip
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=1000, help="Open load: requests a second, arriving at random; may be repeated."),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Requests of a load. Default: 4 of each client, 32 of an open load."),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Measure this server, which serves the bundle. TLS and token: ENGINECAST_CA, ENGINECAST_TOKEN. "
            "Default: a server that is started for it.",
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The bundle's name on that server. Default: its own.")
    ] = None

    def loads(self) -> tuple[Load, ...]:
        """What is measured, the closed loads first."""
        from profiles.serving.load import CLOSED, OPEN, Load

        clients = self.clients or (() if self.rate else CLIENTS)
        closed = [Load(CLOSED, count, self.requests or EACH * count) for count in clients]
        return (*closed, *(Load(OPEN, rate, self.requests or ARRIVING) for rate in self.rate or ()))

    @property
    def most(self) -> int:
        """Requests that a server started here runs at once: all of a closed load, as many as usual of an open one."""
        most: int = Settings.parallel
        return max(most, *(self.clients or CLIENTS))

    def check(self, metric: object, target: object, pictures: object) -> None:
        """Raise InvalidInput for options that do not go together."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "serve"} | {
            "pictures": pictures
        }
        for name in (name for name, value in own.items() if value and not self.serve):
            raise InvalidInput(name, "belongs to --serve: give that too")
        if self.serve and metric:
            raise InvalidInput("metric", "and --serve exclude each other: leave it out")
        if self.model and not self.address:
            raise InvalidInput("model", "belongs to --address: give that too")
        if self.address and target:
            raise InvalidInput("target", "and --address exclude each other: the server at the address has chosen one")


@app.command()
@with_fields("sizes", SizeOptions)
@with_fields("load", LoadOptions)
def bench(
    sizes: SizeOptions,
    load: LoadOptions,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder made by `enginecast build`.")],
    target: Targets = None,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions that count; one more is made first.")] = 5,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "--submodel",
            help="Measure only this: a submodel, picture, first_token, prefill or decode; may be repeated.",
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
    from profiles.rows import append
    from profiles.worker import Job
    from runtime.bundle.manifest import Bundle

    opened = Bundle(bundle)
    settings = _fitting(opened.manifest.task, asdict(sizes))
    _check_rows(store, rows_file)
    load.check(metric, target, sizes.pictures)
    beside_it = [measuring.Worker(_command(command)) for command in beside or ()]
    if load.serve:
        rows = _bench_served(opened, load, target, threads, settings, repeat, beside_it)
    else:
        jobs = [
            Job(bundle=bundle, target=name, threads=threads, settings=settings) for name in _targets(opened, target)
        ]
        workers = [*map(measuring.bundle_worker, jobs), *beside_it]
        rows = measuring.bench(opened, workers, measuring.BenchPlan(repeat, tuple(metric or ())), notes.print)
        out.print(measuring.table(rows))
    if store:
        append(_store(rows_file), rows)


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
    batch: Annotated[int | None, typer.Option(min=1, max=32, help="Pictures drawn together. Default: 16.")] = None,
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
    options = _fitting(task, {"steps": steps, "guidance_scale": guidance_scale, "batch": batch})
    _check_rows(store, rows_file)
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
        if store:
            append(_store(rows_file), scoring.rows(subject, setting, scores, threads, ability))
    out.print(scoring.table(results))


def _fitting(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given. Raises InvalidInput for one that applies to models of another task."""
    from profiles.task import profile_tasks

    fitting = profile_tasks()[task]
    given = {name: value for name, value in options.items() if value is not None}
    for option in (name.replace("_", "-") for name in given):
        if option not in fitting.options:
            raise InvalidInput(option, f"does not apply to a model that {fitting.does}: leave it out")
    return given


def _check_rows(store: bool, rows_file: Path | None) -> None:
    if rows_file is not None and not store:
        raise InvalidInput("rows", "is where --store puts rows: give that too")


def _command(text: str) -> Sequence[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidInput("beside", f"is no command: {error}") from None
    if not words:
        raise InvalidInput("beside", "is empty, expected the command of a worker")
    return words


def _store(path: Path | None) -> Path:
    return path or user_folder() / f"{machine.slug()}.jsonl"
