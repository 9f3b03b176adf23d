"""Measure ours and peers in turns; one that fails is left out from then on, and the others go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from profiles.bench import Say, bandwidth_for, labelled, of_one_run, once, row_of
from profiles.memory import GB, Usage
from profiles.peers.limits import Limits
from profiles.process import Worker
from profiles.rows import Row
from runtime.bundle.manifest import Bundle
from runtime.errors import EnginecastError
from runtime.timing import turns

NONE: Final = Limits()
PEAK: Final = "memory."
"""What the metrics of peaks of anonymous memory begin with; the rest is what was measured meanwhile."""
RESIDENT: Final = "resident."
"""Likewise of all memory, with pages that are mapped from files."""


@dataclass
class Party:
    """Someone who is measured: `size` are the bytes of what it loads, None where they are not known. `forms` are what
    the products of a metric are made in (`profiles.peers.limits`). `failure` says why it was left out; `found` are its
    rows by metric.
    """

    name: str
    worker: Worker
    size: int | None = None
    forms: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    found: dict[str, Row] = field(default_factory=dict)

    def has(self, metric: str) -> bool:
        """Whether it can still be asked for that."""
        return not self.failure and metric in self.worker.hello["metrics"]

    def attempt(self, metric: str) -> float | None:
        """One repetition; None where it fails, or has before."""
        if self.failure:
            return None
        try:
            return self.worker.measure(metric)
        except EnginecastError as error:
            self.failure = f"{metric}: {error}"
            return None


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and the limits that are printed beside it."""

    metrics: Sequence[str]
    repeat: int
    limits: Limits = NONE


def measured(bundle: Bundle, parties: Sequence[Party], plan: Plan, say: Say) -> list[Row]:
    """The rows of all parties, which also get them as `found`: each metric in turns, its peaks of memory, loading,
    size and the peak of memory from its start on.
    """
    with ExitStack() as stack:
        for party in parties:
            _enter(party, stack, say)
        wanted = [metric for metric in plan.metrics if any(party.has(metric) for party in parties)]
        bandwidth = bandwidth_for(wanted, [party.worker for party in parties if not party.failure], say)
        peaks = {party.name: [party.worker.usage()] for party in parties if not party.failure}
        for metric in wanted:
            having = [party for party in parties if party.has(metric)]
            taken = turns([partial(party.attempt, metric) for party in having], plan.repeat)
            for party, values in zip(having, taken, strict=True):
                if party.failure:
                    say(f"{party.name} failed: {party.failure}")
                    continue
                peaks[party.name].append(party.worker.usage())
                row = row_of(bundle, party.worker, metric, [value for value in values if value is not None], bandwidth)
                if row.bound is None:
                    row = row.model_copy(update={"bound": plan.limits.of(metric, party.forms.get(metric, ""))})
                _keep(party, [row, *_peaks(bundle, party, metric, peaks[party.name][-1])])
                say(f"{metric}, {party.name}: {row.spread.median:.4g} {row.unit}")
        for party in parties:
            if not party.failure:
                _keep(party, _whole(bundle, party, peaks[party.name]))
    rows = iter(of_one_run(row for party in parties for row in party.found.values()))
    for party in parties:
        party.found = {metric: next(rows) for metric in party.found}
    return [row for party in parties for row in party.found.values()]


def _enter(party: Party, stack: ExitStack, say: Say) -> None:
    """Load it, unless it could not be prepared."""
    if party.failure:
        return
    say(f"loading {party.name}")
    try:
        stack.enter_context(party.worker)
    except EnginecastError as error:
        party.failure = str(error)
        say(f"{party.name} failed: {party.failure}")


def _keep(party: Party, rows: Iterable[Row]) -> None:
    party.found |= {row.metric: row for row in rows}


def _peaks(bundle: Bundle, party: Party, metric: str, usage: Usage | None) -> list[Row]:
    """The rows of the memory that it held at most while a metric was measured."""
    if usage is None:
        return []
    of, hello = party.worker.bundle or bundle, party.worker.hello
    values = {PEAK: usage.anonymous, RESIDENT: usage.resident}
    return [labelled(of, hello, f"{name}{metric}", "GB", [value / GB]) for name, value in values.items()]


def _whole(bundle: Bundle, party: Party, peaks: Sequence[Usage | None]) -> list[Row]:
    """The rows of figures that are measured once."""
    peak = max((usage.anonymous for usage in peaks if usage is not None), default=None)
    return once(party.worker.bundle or bundle, party.worker.hello, party.size, peak)
