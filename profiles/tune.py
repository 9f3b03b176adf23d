"""The command `enginecast tune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from calibration.ground import machine
from profiles.rows import append
from runtime.bundle.manifest import Bundle
from runtime.engine import Options
from runtime.placing import placement
from runtime.placing.decided import Decided
from runtime.placing.devices import detect
from runtime.placing.measured import user_folder
from runtime.placing.placement import PlacementOptions
from runtime.placing.variants import chosen, variants

BUSY: Final = 0.1
"""Share of the processors' time in other programs, from which on a measurement is doubtful."""
LOOK: Final = 0.5
"""Seconds for which other programs are watched."""
NONE: Final = "nothing is decided by figures: there was nothing to choose from, or nothing is faster than the usual"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
out = Console(highlight=False, markup=False, soft_wrap=True)
notes = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)


@app.command()
def tune(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE...", help="Folders made by `enginecast build`, or folders of several for one model."
        ),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Engine to measure; repeat for several. Default: all that run here."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=100, help="Repetitions that count; one more is made first.")] = 3,
) -> None:
    """Measure quickly which target, how many threads and how many calls at once are fastest here, and store that."""
    from profiles.tuning import Tuning

    busy = others()
    if busy > BUSY:
        notes.print(f"other programs keep {busy:.0%} of the processors busy: what is measured now may choose wrongly")
    opened = [Bundle(folder) for bundle in bundles for folder in variants(bundle) or [bundle]]
    file = user_folder() / f"{machine.slug()}.jsonl"
    for bundle in opened:
        for rows in Tuning.of(bundle, target or (), repeat, notes.print).rows():
            append(file, rows)
    for bundle in opened:
        out.print(f"{bundle.name}:")
        for line in decisions(bundle, PlacementOptions()) or [NONE]:
            out.print(f"  {line}")
    for folder in bundles:
        if decision := chosen(folder).decision:
            out.print(f"of {folder}, {decision.value} is loaded: {decision.reason}")
    out.print(f"the rows are in {file}")


def others() -> float:
    """The share of the processors' time that other programs have now, 0 where the system does not tell."""
    looked = machine.Others()
    time.sleep(LOOK)
    return looked.share() or 0.0


def decisions(bundle: Bundle, placing: PlacementOptions) -> list[str]:
    """What figures decide of a bundle now."""
    found, machine = dict[str, None](), detect()
    plan = placement.place(bundle, None, "", placing, machine)
    for name, choice in plan.choices.items():
        for what, decision in Decided(Options(), plan, machine).of(bundle.submodel(name), choice.places[0]).items():
            found[f"{what}={decision.value}: {decision.reason}"] = None
    return list(found)
