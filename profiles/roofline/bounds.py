"""The limits that a machine's roofline sets to the calls of a model's submodels (Williams, Waterman and Patterson
2009): a call takes at least the time to read its weights, and that of its operations at the rate of a large product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from profiles.bench import labelled, worker_of
from profiles.probes import OPERATIONS
from profiles.roofline.rates import BANDWIDTH, GIGA, PRODUCT
from profiles.rows import Row
from profiles.worker import Job
from runtime.bundle.manifest import Bundle, Submodel

WEIGHTS: Final = "weight bytes"
COUNTED: Final = "operations."
"""What the metrics of counted operations begin with; the rest is the submodel."""


def counted(job: Job) -> list[Row]:
    """A row for the operations of a call of each submodel without states, in billions; its setting `WEIGHTS` has the
    bytes of the weights. Raises EngineError.
    """
    bundle = Bundle(job.bundle)
    with worker_of(job.model_copy(update={"purpose": "count"}), {}) as worker:
        metrics = worker.hello["metrics"]
        return [
            labelled(
                bundle,
                worker.hello,
                f"{COUNTED}{name}",
                OPERATIONS,
                [worker.measure(name)],
                settings={**metric.get("settings", {}), WEIGHTS: bundle.submodel(name).nbytes},
            )
            for name, metric in metrics.items()
        ]


def bounded(rows: Sequence[Row], bundle: Bundle, counts: Sequence[Row], roofline: Sequence[Row]) -> list[Row]:
    """The rows, those of submodels with their limits in seconds, where the roofline has the rate of their precision."""
    submodels = {submodel.name: submodel for submodel in bundle.manifest.submodels}
    work = {call(row): row.spread.median for row in counts}
    reads = max((row.spread.maximum for row in roofline if row.metric == BANDWIDTH), default=0.0)
    rates = {(row.target, row.quant): row.spread.maximum for row in roofline if row.metric == PRODUCT}
    found = []
    for row in rows:
        done = work.get(call(row))
        submodel = submodels.get(row.metric)
        rate = rates.get((row.target, form(submodel))) if submodel else None
        if not done or submodel is None or rate is None or not reads:  # a table is not read whole
            found.append(row)
        else:
            bound = max(done / rate, submodel.nbytes / GIGA / reads)
            found.append(row.model_copy(update={"bound": bound}))
    return found


def call(row: Row) -> tuple[object, ...]:
    """What a row of a submodel's call, or of its operations, is of: the submodel and the shapes."""
    shapes = sorted((name, value) for name, value in row.settings.items() if name != WEIGHTS)
    return row.metric.removeprefix(COUNTED), *shapes


def form(submodel: Submodel) -> str:
    """Which product a submodel's large layers are: by its inputs where they are rounded, else by its weights."""
    precision = submodel.precision
    if precision.activations == "int8":
        return "int8"
    return "int4" if {"int4", "nf4"} & set(precision.weights) else precision.compute
