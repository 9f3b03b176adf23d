"""What a report shows of rows: the newest of each figure, by machine and model, as series for plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from profiles.bench import SIZE
from profiles.compare.verdicts import more_is_better
from profiles.peers.measuring import RESIDENT
from profiles.probes import BATCHED
from profiles.roofline.bounds import COUNTED, WEIGHTS, call
from profiles.roofline.rates import BANDWIDTH, MACHINE, PRODUCT
from profiles.rows import Row
from profiles.serving.worker import THROUGHPUT
from runtime.timing import Spread

OURS: Final = "enginecast"
QUALITY: Final = "right"
SPEEDS: Final = ("picture", "decode", "embedding")
"""Metrics that stand for the speed of a model, the first that it has."""
FACTS: Final = ("load", "memory", RESIDENT, SIZE, f"{QUALITY}.", BATCHED, "served_", "energy.", COUNTED)
"""What the metrics begin with that are neither the speed of a call nor a score."""


@dataclass(frozen=True)
class Bar:
    """One measured speed or score: who ran it, on which target, and its spread."""

    label: str
    target: str
    spread: Spread
    reached: float | None


@dataclass(frozen=True)
class Line:
    """A rate against a number of requests: batch or clients."""

    label: str
    target: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Trade:
    """A bundle on a target: its size in GB, its quality in percent, its speed, None where it was not measured."""

    label: str
    target: str
    size: float
    quality: float
    speed: float | None
    unit: str


@dataclass(frozen=True)
class Point:
    """A submodel's call in a roofline: operations for each byte of its weights, billions of operations a second."""

    label: str
    target: str
    intensity: float
    rate: float
    reached: float | None


@dataclass(frozen=True)
class Ceiling:
    """The rate of a large product on a target in a precision, in billions of operations a second."""

    label: str
    target: str
    rate: float


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each figure."""
    found = {
        (
            row.metric, row.source, row.quant, row.target, row.device, row.threads, machine(row),
            row.program.split(" ")[0], tuple(sorted(row.settings.items())),
        ): row
        for row in sorted(rows, key=lambda row: row.date)
    }  # fmt: skip
    return list(found.values())


def machine(row: Row) -> str:
    """The machine of a row in words: its fingerprint where it has one."""
    return str(row.fingerprint) if row.fingerprint is not None else row.cpu


def by_machine(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """The newest rows by machine and model, the machine with the most rows first."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in newest(rows):
        found[machine(row)][row.source].append(row)
    return dict(sorted(found.items(), key=lambda each: -sum(map(len, each[1].values()))))


def label(row: Row) -> str:
    """Who ran what: "int8 on openvino", of others with their name."""
    name = row.program.split(" ")[0]
    what = f"{'unquantized' if row.quant == 'none' else row.quant} on {row.target}"
    return what if name == OURS else f"{name} {what}"


def bars(rows: Iterable[Row]) -> dict[str, list[Bar]]:
    """The speeds and scores of one model by metric with its unit, the best of each first. Of a metric that was measured
    at several settings, the newest one's.
    """
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.date):
        if row.source != MACHINE and not row.metric.startswith(FACTS):
            arrow = "\N{UPWARDS ARROW}" if more_is_better(row.unit) else "\N{DOWNWARDS ARROW}"
            found[f"{row.metric}, {row.unit} {arrow}"][label(row)] = row
    return {
        name: [
            Bar(one, row.target, row.spread, row.reached)
            for one, row in sorted(each.items(), key=lambda pair: _cost(pair[1]))
        ]
        for name, each in found.items()
    }


def _cost(row: Row) -> float:
    return -row.spread.median if more_is_better(row.unit) else row.spread.median


def lines(rows: Iterable[Row], metric: str, setting: str) -> tuple[str, list[Line]]:
    """The unit of a rate, and its lines against a setting."""
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    unit = ""
    for row in rows:
        if row.metric == metric and isinstance(value := row.settings.get(setting), (int, float)):
            found[label(row), row.target][float(value)] = row.spread.median
            unit = row.unit
    return unit, [Line(*key, tuple(sorted(points.items()))) for key, points in found.items() if len(points) > 1]


def batches(rows: Sequence[Row]) -> tuple[str, list[Line]]:
    """Rates of requests that run together, against their number."""
    return lines(rows, BATCHED, "batch")


def loads(rows: Sequence[Row]) -> tuple[str, list[Line]]:
    """Throughput of servers against the number of clients."""
    return lines(rows, THROUGHPUT, "clients")


def trades(rows: Sequence[Row]) -> list[Trade]:
    """Our bundles whose size and quality are known."""
    known: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.program.startswith(OURS):
            known[row.quant, row.target][row.metric] = row
    found = []
    for (_, target), metrics in known.items():
        speed = next((metrics[name] for name in SPEEDS if name in metrics), None)
        if SIZE in metrics and QUALITY in metrics:
            size, quality = (metrics[name].spread.median for name in (SIZE, QUALITY))
            value, unit = (speed.spread.median, speed.unit) if speed else (None, "")
            found.append(Trade(label(metrics[SIZE]), target, size, quality, value, unit))
    return found


def ceilings(rows: Iterable[Row]) -> tuple[float, list[Ceiling]]:
    """The bandwidth in GB/s, 0 where it was not measured, and the products of a machine."""
    of_machine = [row for row in rows if row.source == MACHINE]
    bandwidth = max((row.spread.maximum for row in of_machine if row.metric == BANDWIDTH), default=0.0)
    products = [row for row in of_machine if row.metric == PRODUCT]
    return bandwidth, [Ceiling(f"{row.quant} on {row.target}", row.target, row.spread.maximum) for row in products]


def points(models: Mapping[str, Sequence[Row]]) -> list[Point]:
    """The submodels' calls whose operations were counted."""
    found = []
    for rows in models.values():
        counts = {(row.quant, *call(row)): row for row in rows if WEIGHTS in row.settings}
        for row in rows:
            count = counts.get((row.quant, *call(row)))
            if count is None or row is count or row.unit != "s" or not count.spread.median:
                continue
            work, weights = count.spread.median, float(count.settings[WEIGHTS]) / 1e9
            found.append(
                Point(
                    f"{row.source} {row.metric}, {label(row)}",
                    row.target,
                    work / weights,
                    work / row.spread.median,
                    row.reached,
                )
            )
    return found
