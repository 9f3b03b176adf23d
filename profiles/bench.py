"""Measure models side by side: each in a process of its own, in turns (A B A B), after one run that does not count.

Turns matter because a machine's speed drifts with its load and temperature: all models then see the same drift.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

from rich.table import Table

from calibration.ground import machine
from profiles import energy
from profiles.memory import GB
from profiles.process import Worker
from profiles.protocol import Hello
from profiles.rows import Row
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput, did_you_mean
from runtime.placing.fingerprint import here
from runtime.placing.processor import processor
from runtime.timing import Spread, turns

SIZE: Final = "size"
"""The metric of the bytes that a bundle's graphs and weights have."""
Say = Callable[[str], None]


def bundle_worker(job: Job) -> Worker:
    """The worker that measures a bundle of ours."""
    return worker_of(job, {})


def worker_of(job: Job, environment: Mapping[str, str]) -> Worker:
    """The same with these variables besides those of this process."""
    return Worker([sys.executable, "-m", "profiles.worker", job.model_dump_json()], Bundle(job.bundle), environment)


@dataclass(frozen=True)
class BenchPlan:
    """Which metrics to measure, and how often: `repeat` times, or 3 times where they take longer than `budget` seconds.
    No metrics means all of the workers'.
    """

    repeat: int = 5
    metrics: tuple[str, ...] = ()
    budget: float = math.inf


def bench(bundle: Bundle, workers: Iterable[Worker], plan: BenchPlan, say: Say = lambda line: None) -> list[Row]:
    """Measure all workers in turns; a row for each metric of each. Raises EngineError, or InvalidInput for a metric
    none of them has.
    """
    return [row for _, row in measured(bundle, workers, plan, say)]


def measured(
    bundle: Bundle, workers: Iterable[Worker], plan: BenchPlan, say: Say = lambda line: None
) -> list[tuple[Worker, Row]]:
    """As `bench`, each row with its worker."""
    say(str(here()))
    with ExitStack() as stack:
        entered = [stack.enter_context(worker) for worker in workers]  # one after another: loading is timed too
        known = list(dict.fromkeys(name for worker in entered for name in worker.hello["metrics"]))
        metrics = wanted(plan.metrics, known, "of this bundle")
        bandwidth = bandwidth_for(metrics, entered, say)
        found = []
        meter = energy.meter()
        for metric in metrics:
            having = [worker for worker in entered if metric in worker.hello["metrics"]]
            measurements = [partial(energy.metered, meter, partial(worker.measure, metric)) for worker in having]
            for worker, taken in zip(having, turns(measurements, plan.repeat, budget=plan.budget), strict=True):
                row = row_of(bundle, worker, metric, [value for value, _ in taken], bandwidth)
                found.append((worker, row))
                say(f"{metric} on {worker.hello['target']}: {row.spread.median:.4g} {row.unit}")
                joules = [spent for _, spent in taken if spent is not None]
                if joules:
                    found.append((worker, _energy(row, joules)))
        found += [(worker, row) for worker in entered for row in whole(bundle, worker)]
    return list(zip([worker for worker, _ in found], of_one_run(row for _, row in found), strict=True))


def of_one_run(rows: Iterable[Row]) -> list[Row]:
    """The rows, marked as measured in turns."""
    run = secrets.token_hex(8)
    return [row.model_copy(update={"run": run}) for row in rows]


def bandwidth_for(metrics: Sequence[str], workers: Sequence[Worker], say: Say) -> float:
    """How fast memory is read, in bytes a second; not measured, and 0, where nothing depends on it."""
    if not any(
        "bytes" in metric for worker in workers for name, metric in worker.hello["metrics"].items() if name in metrics
    ):
        return 0.0
    bandwidth = machine.read_bandwidth()
    say(f"memory is read at {bandwidth / GB:.1f} GB/s")
    return bandwidth


def _energy(row: Row, joules: Sequence[float]) -> Row:
    """The row of the energy that the repetitions of another one took."""
    changes = {"metric": f"energy.{row.metric}", "unit": "J", "bound": None}
    return row.model_copy(update=changes | {"spread": Spread.of(joules), "values": tuple(joules)})


def wanted(requested: Sequence[str], known: Sequence[str], of: str) -> Sequence[str]:
    """The requested ones of the metrics known `of` something, all of them where none are requested. Raises
    InvalidInput.
    """
    for name in requested:
        if name not in known:
            raise InvalidInput("metric", f"'{name}' is not measured {of}: {did_you_mean(name, known)}")
    return requested or known


def row_of(bundle: Bundle, worker: Worker, name: str, values: Sequence[float], bandwidth: float) -> Row:
    """The row of a worker's metric, where memory is read at so many bytes a second."""
    metric = worker.hello["metrics"][name]
    bound = bandwidth / metric["bytes"] if "bytes" in metric else None
    of, settings = worker.bundle or bundle, metric.get("settings", {})
    return labelled(of, worker.hello, metric.get("name", name), metric["unit"], values, bound, settings)


def whole(bundle: Bundle, worker: Worker) -> list[Row]:
    """Figures without repetitions: loading, the size of a bundle of ours, and the peak of memory over the whole run."""
    of = worker.bundle or bundle
    size = sum(submodel.nbytes for submodel in of.manifest.submodels) if worker.bundle is not None else None
    return once(of, worker.hello, size, worker.peak_memory())


def once(of: Bundle, hello: Hello, size: int | None, peak: int | None) -> list[Row]:
    """The rows of loading, and of the size and the peak of memory in bytes, where they are known."""
    rows = [labelled(of, hello, "load", "s", [hello["load"]])]
    known = {name: nbytes for name, nbytes in ((SIZE, size), ("memory", peak)) if nbytes is not None}
    return rows + [labelled(of, hello, name, "GB", [nbytes / GB]) for name, nbytes in known.items()]


def labelled(
    bundle: Bundle,
    hello: Hello,
    metric: str,
    unit: str,
    values: Sequence[float],
    bound: float | None = None,
    settings: Mapping[str, int | float | str] | None = None,
) -> Row:
    """The row of a figure that a worker measured."""
    return Row(
        metric=metric,
        unit=unit,
        spread=Spread.of(values),
        values=tuple(values),
        bound=bound,
        program=hello["program"],
        bundle=bundle.name,
        source=bundle.manifest.source.name,
        family=bundle.manifest.source.family,
        quant=hello.get("quant", bundle.manifest.quant),
        target=hello["target"],
        device=hello["device"],
        cpu=processor(),
        threads=hello["threads"],
        settings=settings or {},
        versions=hello["versions"],
        date=datetime.now(UTC),
        notes=hello.get("notes", ""),
        fingerprint=here(),
    )


def table(rows: Sequence[Row]) -> Table:
    """Rows for reading: metrics together, each compared with the first program and target that has it."""
    shown = Table("metric", "program", "target", "median", "quartiles", "range", "n", "of bound", "ratio")
    first: dict[str, float] = {}
    for metric in dict.fromkeys(row.metric for row in rows):
        for row in (row for row in rows if row.metric == metric):
            spread = row.spread
            base = first.setdefault(metric, spread.median)
            unit, scale = ("ms", 1e3) if row.unit == "s" and base < 0.1 else (row.unit, 1.0)
            lowest, lower, median, upper, highest = (
                f"{value * scale:.4g}"
                for value in (spread.minimum, spread.lower, spread.median, spread.upper, spread.maximum)
            )
            together = row.settings.get("batch")
            shown.add_row(
                metric if together is None else f"{metric} {together}",
                row.program,
                f"{row.target} {row.quant}",
                f"{median} {unit}",
                f"{lower}..{upper}",
                f"{lowest}..{highest}",
                str(spread.repetitions),
                f"{row.reached:.0%}" if row.reached is not None else "",
                f"{spread.median / base:.2f}" if base else "",
            )
    return shown
