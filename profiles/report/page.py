"""The report as one page, which needs neither network nor scripts, and its plots as files."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from profiles.report import figures, plots
from profiles.report.plots import Plot, Style
from profiles.roofline.rates import MACHINE
from profiles.rows import Row
from runtime.files import written

PAGE: Final = "report.html"
SPEED: Final = (
    "By target and precision (\N{UPWARDS ARROW} more is better, \N{DOWNWARDS ARROW} less; percent: share of the limit)"
)
FLAT: Final = 4.2
"""Inches of a plot that is no bar chart."""


@dataclass(frozen=True)
class Section:
    """A model on a machine: its plots, and its rows."""

    title: str
    plots: Sequence[Plot]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Part:
    """A machine with its models."""

    machine: str
    sections: Sequence[Section]


def parts(rows: Sequence[Row]) -> list[Part]:
    """Everything that a report shows. Raises MissingDependency without matplotlib."""
    colour = plots.colours([row.target for row in rows])
    found = []
    for number, (machine, models) in enumerate(figures.by_machine(rows).items(), 1):
        sections = [
            Section(source, list(_of_model(f"{number}-{_slug(source)}", each, colour)), _shown(each))
            for source, each in sorted(models.items())
            if source != MACHINE
        ]
        everything = [row for each in models.values() for row in each]
        if limits := list(_of_machine(f"{number}", everything, models, colour)):
            sections.insert(0, Section("Limits of the machine", limits, _shown(models.get(MACHINE, ()))))
        found.append(Part(machine, sections))
    return found


def _of_model(name: str, rows: Sequence[Row], colour: Mapping[str, str]) -> Iterator[Plot]:
    if panels := figures.bars(rows):
        draw, height = plots.latency(panels, colour)
        yield plots.plot(f"{name}-speed", SPEED, draw, height)
    if trades := figures.trades(rows):
        yield plots.plot(
            f"{name}-trade", "Size against quality; the area is the speed", plots.trading(trades, colour), FLAT
        )
    scalings: tuple[tuple[str, str, str, Callable[[Sequence[Row]], tuple[str, Any]]], ...] = (
        ("batch", "Requests that run together", "requests together", figures.batches),
        ("load", "Throughput of a server against concurrency", "clients", figures.loads),
    )
    for kind, title, across, gather in scalings:
        unit, lines = gather(rows)
        if lines:
            yield plots.plot(f"{name}-{kind}", title, plots.scaling(unit, lines, across, colour), FLAT)


def _of_machine(
    name: str, rows: Sequence[Row], models: Mapping[str, Sequence[Row]], colour: Mapping[str, str]
) -> Iterator[Plot]:
    bandwidth, ceilings = figures.ceilings(rows)
    if bandwidth and ceilings:
        points = figures.points(models)
        draw: Callable[[Any, Style], None] = plots.rooflines(bandwidth, ceilings, points, colour)
        height = FLAT + 0.11 * len(points)
        yield plots.plot(f"{name}-roofline", "Roofline: the limits, and what calls reach of them", draw, height)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _shown(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.metric, sorted(map(str, row.settings.items())), row.target, row.quant))


def write(rows: Sequence[Row], output: Path) -> list[Path]:
    """Write the page, and beside it each plot as `<page>-<plot>.png`, for light pages. Returns all files. Raises
    ResourceExhausted when the disk is full.
    """
    found = parts(rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(PAGE).render(parts=found, data=_data, label=figures.label)
    files = {output: text.encode()}
    for part in found:
        for section in part.sections:
            files |= {output.with_name(f"{output.stem}-{one.name}.png"): one.light for one in section.plots}
    for path, content in files.items():
        with written(path) as file:
            file.write(content)
    return list(files)


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
