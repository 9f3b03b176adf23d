"""The limits that this machine sets to calls of submodels, ours and peers': their operations at the rate of a large
product in the form that each computes in (`profiles.roofline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from profiles.bench import Say
from profiles.roofline.bounds import COUNTED, counted
from profiles.roofline.rates import PRODUCT, roofline
from profiles.rows import Row
from profiles.worker import Job
from runtime.bundle.manifest import Bundle


@dataclass(frozen=True)
class Limits:
    """Billions of operations of a call by metric, and the best rate of a product by form, in billions a second."""

    operations: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def of(self, metric: str, form: str) -> float | None:
        """Seconds that a call takes at least; None where its operations or the rate of its form are not known."""
        done, rate = self.operations.get(metric), self.rates.get(form)
        return done / rate if done and rate else None


def limits(jobs: Sequence[Job], metrics: Iterable[str], say: Say) -> Limits:
    """Measured for the submodels among the metrics, of the first job's bundle, on the targets of all; nothing is
    measured where there are none. Raises EngineError, MissingDependency.
    """
    bundle = Bundle(jobs[0].bundle)
    if not {submodel.name for submodel in bundle.manifest.submodels}.intersection(metrics):
        return Limits()
    say("counting operations, and measuring the rates of products")
    return limits_of(counted(jobs[0]), roofline(list(dict.fromkeys(job.target for job in jobs)), 0, say))


def limits_of(counts: Iterable[Row], measured: Iterable[Row]) -> Limits:
    """Of rows of counted operations and of a roofline."""
    rates: dict[str, float] = {}
    for row in measured:
        if row.metric == PRODUCT:
            rates[row.quant] = max(rates.get(row.quant, 0.0), row.spread.maximum)
    return Limits({row.metric.removeprefix(COUNTED): row.spread.median for row in counts}, rates)
