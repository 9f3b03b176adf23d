"""Measure servers under the same loads, in turns: throughput, and the time to the first output of each answer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

from rich.table import Table

from profiles.bench import Say, labelled, of_one_run, whole
from profiles.process import Worker
from profiles.rows import Row
from profiles.serving.load import CLOSED, OPEN, Load, Observed
from profiles.serving.worker import THROUGHPUT, Job
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError
from runtime.timing import turns

PERCENTILES: Final = (50, 95, 99)
SERVED: Final = "served_"
"""What the metrics of loads begin with."""
REFUSED: Final = "served_refused"
SECONDS: Final = {"s": 1.0, "min": 60.0}
"""By what a rate is counted, after the slash of its unit."""
AMOUNTS: Final = {CLOSED: "clients", OPEN: "rate"}
"""What a load's amount is called in the settings of a row."""


@dataclass(frozen=True)
class LoadPlan:
    """Which loads to measure, and how often."""

    loads: tuple[Load, ...]
    repeat: int


def server_worker(job: Job) -> Worker:
    """The worker that loads a server of ours."""
    return Worker([sys.executable, "-m", "profiles.serving.worker", job.model_dump_json()])


def bench(bundle: Bundle, workers: Iterable[Worker], plan: LoadPlan, say: Say = lambda line: None) -> list[Row]:
    """Measure all workers under each load, in turns. Raises EngineError."""
    with ExitStack() as stack:
        entered = [stack.enter_context(worker) for worker in workers]
        for worker in entered:
            if THROUGHPUT not in worker.hello["metrics"]:
                raise EngineError(f"{worker.name} does not measure servers: it has no metric {THROUGHPUT}")
        rows: list[Row] = []
        for load in plan.loads:
            results = turns([partial(_observed, worker, load) for worker in entered], plan.repeat)
            for worker, observed in zip(entered, results, strict=True):
                rows += _rows(bundle, worker, load, observed)
                say(_line(worker, load, observed))
        for worker in entered:
            rows += whole(bundle, worker)
        return of_one_run(rows)


def _observed(worker: Worker, load: Load) -> Observed:
    """One repetition."""
    found = worker.ask(str(load))
    try:
        return Observed(
            amount=float(found["amount"]),
            seconds=float(found["seconds"]),
            first=[float(one) for one in found["first"]],
            refused=int(found["refused"]),
        )
    except (KeyError, TypeError, ValueError):
        raise EngineError(
            f"{worker.name} answered {found} for the load {load}, expected amount, seconds, first and refused: see "
            "profiles/protocol.py"
        ) from None


def _unit(worker: Worker) -> str:
    return worker.hello["metrics"][THROUGHPUT]["unit"]


def _rate(worker: Worker, observed: Observed) -> float:
    """The throughput, in the unit of the worker."""
    return observed["amount"] / observed["seconds"] * SECONDS[_unit(worker).rpartition("/")[2]]


def _rows(bundle: Bundle, worker: Worker, load: Load, results: Sequence[Observed]) -> list[Row]:
    hello = worker.hello
    described = hello["metrics"][THROUGHPUT].get("settings", {})
    settings = {"load": load.mode, AMOUNTS[load.mode]: load.amount, "requests": load.requests, **described}
    rates = [_rate(worker, observed) for observed in results]
    rows = [labelled(bundle, hello, THROUGHPUT, _unit(worker), rates, settings=settings)]
    answered = [observed["first"] for observed in results if observed["first"]]
    for percent in PERCENTILES if answered else ():
        values = [percentile(first, percent) for first in answered]
        rows.append(labelled(bundle, hello, f"served_first_p{percent}", "s", values, settings=settings))
    refused = [float(observed["refused"]) for observed in results]
    return [
        *rows,
        *([labelled(bundle, hello, REFUSED, "requests", refused, settings=settings)] if any(refused) else []),
    ]


def percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many percent of all values do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def _line(worker: Worker, load: Load, results: Sequence[Observed]) -> str:
    rate = median(_rate(worker, observed) for observed in results)
    return f"{worker.hello['program']}, {load.mode} load of {load.amount:g}: {rate:.4g} {_unit(worker)}"


def table(rows: Sequence[Row]) -> Table:
    """Rows for reading: a line for each program and load. `gain` compares with the program's first load of that mode,
    `ratio` with the first program under the same load.
    """
    percentiles = [f"first p{percent}" for percent in PERCENTILES]
    shown = Table("load", "program", "throughput", "range", "gain", "ratio", *percentiles, "refused")
    values = {(_key(row), row.metric): row.spread.median for row in rows}
    firsts: dict[object, float] = {}
    for row in (row for row in rows if row.metric == THROUGHPUT):
        rate, program = row.spread.median, f"{row.program}, {row.target} {row.quant}"
        times = [values.get((_key(row), f"served_first_p{percent}")) for percent in PERCENTILES]
        shown.add_row(
            _load(row),
            program,
            f"{rate:.4g} {row.unit}",
            f"{row.spread.minimum:.4g}..{row.spread.maximum:.4g}",
            _ratio(rate, firsts.setdefault((program, row.settings["load"]), rate)),
            _ratio(rate, firsts.setdefault(_load(row), rate)),
            *("" if seconds is None else f"{seconds:.3g} s" for seconds in times),
            f"{values.get((_key(row), REFUSED), 0):g}",
        )
    return shown


def _load(row: Row) -> str:
    mode = str(row.settings["load"])
    return f"{mode} {row.settings[AMOUNTS[mode]]:g}" + ("" if mode == CLOSED else "/s")


def _key(row: Row) -> tuple[object, ...]:
    return row.program, row.target, *sorted(row.settings.items())


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else ""
