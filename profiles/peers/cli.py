"""`enginecast bench peers`: other tools beside ours on the same checkpoint, in environments of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from profiles.console import notes, out
from profiles.options import SizeOptions, Store, StoreAt, Targets, fitting, rows_file_of
from runtime.errors import EngineError, InvalidInput, MissingDependency
from runtime.stopping import stoppable
from serving.cli.options import with_fields

if TYPE_CHECKING:
    from profiles.peers.declared import Peer
    from profiles.peers.environments import Workplace
    from profiles.peers.measuring import Party, Plan
    from profiles.worker import Job
    from runtime.bundle.manifest import Bundle

REPEAT: Final = 7


@with_fields("sizes", SizeOptions, without=("pictures", "forecast"))
@stoppable("environments and exports that were finished are kept")
def peers(
    sizes: SizeOptions,
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.")],
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="[BUNDLE...]", help="Bundles built from it; the first is `ours`.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(metavar="WORK", help="Where environments and exports are kept from run to run.")
    ] = Path("peers"),
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure only this peer; may be repeated.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Measure only this; may be repeated.")] = None,
    target: Targets = None,
    forecast: Annotated[
        str | None, typer.Option(metavar="STEPS", help="Steps of our pictures that run the UNet; peers run it in all.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Repetitions that count; one more is made first. Fewer than 6 show nothing.")
    ] = REPEAT,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Make environments and exports, and measure nothing.")
    ] = False,
    with_limits: Annotated[
        bool, typer.Option("--limits/--no-limits", help="Measure the limits of submodels' calls first; takes a minute.")
    ] = True,
    table: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown, too.")] = None,
    store: Store = False,
    rows_file: StoreAt = None,
) -> None:
    """Measure other tools beside ours on the same checkpoint: make their environments and exports, then take turns."""
    from profiles.bench import wanted
    from profiles.peers import declared
    from profiles.peers.environments import inside
    from profiles.peers.limits import limits as find_limits
    from profiles.peers.measuring import NONE, Plan

    rows_path = rows_file_of(store, rows_file)
    if not bundles and not prepare_only:
        raise InvalidInput("BUNDLE", "is missing: name a bundle of the checkpoint, or give --prepare-only")
    task, fingerprint = _identity(checkpoint)
    opened = _of_checkpoint(bundles or (), checkpoint, fingerprint)
    chosen = declared.peers(task, only or ())
    given = fitting(task, asdict(sizes))
    ours = fitting(task, {"forecast": forecast})
    workplace, failed = _prepared(folder, checkpoint, fingerprint, chosen)
    if prepare_only:
        if failed:
            raise EngineError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        return
    measured = declared.sizes(opened[0], given)
    with inside() as variables:
        jobs = _jobs(opened, target, measured | ours)
        metrics = wanted(metric or declared.usual(chosen), declared.known(chosen), "of these peers")
        limits = find_limits(jobs, metrics, notes.print) if with_limits else NONE
        theirs = [workplace.party(peer, measured, variables, failed.get(peer.name, "")) for peer in chosen]
        parties = [*map(_ours, jobs), *theirs]
        _measure(opened[0], parties, Plan(metrics, repeat, limits), table, rows_path)


def _identity(checkpoint: Path) -> tuple[str, str]:
    """The task and the fingerprint of a checkpoint. Raises SourceError, MissingDependency."""
    try:
        from export.build.options import Options
        from export.build.state import Build
    except ImportError as error:
        raise MissingDependency(error.name or "torch", "export") from None
    state = Build.open(Options(str(checkpoint), Path("unused")))
    return state.task, state.fingerprint


def _of_checkpoint(roots: Iterable[Path], checkpoint: Path, fingerprint: str) -> list[Bundle]:
    """The bundles. Raises InvalidInput for one of another checkpoint, and what opening raises."""
    from runtime.bundle.manifest import Bundle

    opened = [Bundle(root) for root in roots]
    for bundle in opened:
        if bundle.manifest.source.fingerprint != fingerprint:
            raise InvalidInput("BUNDLE", f"{bundle.root} was built from another checkpoint than {checkpoint}")
    return opened


def _prepared(
    folder: Path, checkpoint: Path, fingerprint: str, chosen: Sequence[Peer]
) -> tuple[Workplace, Mapping[str, str]]:
    """What the peers need, made; and why it could not be made, by peer."""
    from profiles.peers.environments import Workplace

    workplace = Workplace(folder.absolute(), checkpoint, fingerprint[:12])
    failed: dict[str, str] = {}
    for peer in chosen:
        try:
            workplace.make_environment(peer.environment, notes.print)
            if peer.export is not None:
                workplace.make_export(peer.export, notes.print)
        except EngineError as error:
            failed[peer.name] = str(error)
            notes.print(f"{peer.name} failed: {error}")
    return workplace, failed


def _jobs(bundles: Sequence[Bundle], targets: Sequence[str] | None, sizes: Mapping[str, Any]) -> list[Job]:
    """The bundles on each target. Raises EngineUnavailable, InvalidInput."""
    from profiles.worker import Job
    from runtime.placing.loading import choose_target

    found = list[Job]()
    wanted: Sequence[str | None] = targets or [None]
    for bundle in bundles:
        names = dict.fromkeys(choose_target(bundle, one).target for one in wanted)
        found += [Job(bundle=bundle.root, target=name, settings=dict(sizes)) for name in names]
    return found


def _ours(job: Job) -> Party:
    """Ours, to be measured."""
    from profiles.bench import bundle_worker
    from profiles.peers.measuring import Party
    from profiles.roofline.bounds import form
    from runtime.bundle.manifest import Bundle

    bundle = Bundle(job.bundle)
    size = sum(submodel.nbytes for submodel in bundle.manifest.submodels)
    forms = {submodel.name: form(submodel) for submodel in bundle.manifest.submodels}
    return Party(f"{bundle.name} on {job.target}", bundle_worker(job), size, forms)


def _measure(bundle: Bundle, parties: Sequence[Party], plan: Plan, table: Path | None, rows_path: Path | None) -> None:
    """Take turns, and show what was found."""
    from profiles.peers import table as tables
    from profiles.peers.measuring import measured
    from profiles.rows import append
    from runtime.files import written
    from runtime.placing.fingerprint import here

    rows = measured(bundle, parties, plan, notes.print)
    cells = tables.lines(parties, plan.metrics)
    out.print(tables.shown(cells))
    for line in tables.failures(parties):
        out.print(f"left out: {line}")
    if table is not None:
        facts = [str(here()), f"{plan.repeat} repetitions in turns, one more first"]
        with written(table) as file:
            file.write(tables.markdown(bundle.manifest.source.name, facts, cells, parties).encode())
    if rows_path is not None:
        append(rows_path, rows)
    if not rows:
        raise EngineError("nobody could be measured: the reasons are above")
