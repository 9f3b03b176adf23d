"""The tables of `enginecast devices`: this machine, its targets, the placement of a bundle, the devices of a server's
models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime.engine import Options, targets
from runtime.placing import placement
from runtime.placing.choices import measured
from runtime.placing.decided import Decided
from runtime.placing.devices import Machine, detect
from runtime.placing.memory import show_size
from runtime.placing.placement import PlacementOptions
from runtime.placing.variants import Chosen, chosen
from serving.dialects.grpc.client import PLAIN, Client
from serving.dialects.grpc.connection import Connection
from serving.enginecast_pb import model_pb2

WIDTH: Final = 160
"""Of tables that do not go to a terminal, in characters."""
UNMEASURED: Final = (
    "targets are in the order of their ranks: no figures of two of them are there for this model on a processor like "
    "this one. `enginecast tune {}` measures them"
)
SIZES: Final = ("memory", "free", "needs")


def collect(
    bundle: Path | None,
    target: str | None,
    device: str,
    placing: PlacementOptions,
    address: str | None,
    connection: Connection = PLAIN,
) -> dict[str, Any]:
    """The rows of each table by its name, for JSON: sizes in bytes, null where they are not known.

    Raises the errors of placing the bundle and of the server.
    """
    machine = detect()
    found: dict[str, Any] = {
        "devices": [asdict(one) for one in machine.devices],
        "targets": [_target(name) for name in targets()],
        "choices": [row for name in targets() for row in _choices(name)],
        "processors": machine.allowed.cpus,
        "notes": list(machine.notes),
    }
    if bundle is not None:
        found |= _placed(chosen(bundle, target, placing), target, device, placing, machine)
    if address is not None:
        with Client(address, connection) as client:
            models = client.models()
        found["models"] = [{"model": model.name, **_running(one)} for model in models for one in model.placements]
        found["notes"] += [f"{model.name}: {note}" for model in models for note in model.notes]
    return found


def _running(one: model_pb2.Placement) -> dict[str, Any]:
    names = ("submodel", "target", "device", "precision")
    return {name: getattr(one, name) for name in names} | {
        "fallbacks": list(one.fallbacks),
        "choices": list(one.choices),
    }


def _target(name: str) -> dict[str, Any]:
    available = targets()[name].available()
    found = asdict(available)
    return {"target": name, "usable": available.usable, "compiles": available.usable or available.compiles} | {
        key: found[key] for key in ("devices", "version", "reason")
    }


def _choices(name: str) -> list[dict[str, Any]]:
    """Choices that were measured on this device for one target."""
    if not targets()[name].choices:
        return []
    rows = measured(name, targets()[name].available().version)
    return [
        {
            "target": name,
            "submodel": row.name,
            "choice": f"{choice}={value}",
            "why": row.reason(choice),
            "measured": f"{row.date:%Y-%m-%d}",
        }
        for row in rows
        for choice, value in row.values.items()
    ]


def _placed(
    found: Chosen, target: str | None, device: str, placing: PlacementOptions, machine: Machine
) -> dict[str, Any]:
    bundle = found.bundle
    plan = placement.place(bundle, target, device, placing, machine)
    decided = Decided(Options(device=device), plan, machine, found.decision)
    rows, figures = [], list[dict[str, str]]()
    for name, choice in plan.choices.items():
        first, *others = choice.places
        figures += [
            {"submodel": name, "choice": f"{what}={decision.value}", "why": decision.reason}
            for what, decision in decided.of(bundle.submodel(name), first).items()
        ]
        needs = choice.estimated[first]
        rows.append(
            {
                "submodel": name,
                "place": str(first),
                "needs": needs,
                "memory of": first.memory,
                "or else": [str(one) for one in others],
            }
        )
    ordered = target or any(one["choice"].startswith("target=") for one in figures)
    unmeasured = [] if ordered else [UNMEASURED.format(bundle.root)]
    return {"placement": rows, "profile": figures, "notes": [*machine.notes, *plan.notes, *unmeasured]}


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """Print the rows as tables, or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    out = console()
    for title, rows in found.items():
        if rows and isinstance(rows, list) and isinstance(rows[0], dict):
            out.print(table(rows, title))
    allowed = found["processors"]
    out.print(f"processors that may be used: {allowed:g}", markup=False)
    for note in found["notes"]:
        out.print(note, markup=False)


def console() -> Console:
    """Prints tables on standard output."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """A table of rows that have the same columns."""
    rows = list(rows)
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(_text(column, value)) for column, value in row.items()))
    return table


def _text(column: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    if column in SIZES:
        return show_size(value)
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)
