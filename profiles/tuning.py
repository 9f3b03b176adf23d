"""Measures quickly what the runtime chooses by: the targets of a bundle, the threads of the fastest, and its calls with
more rows. The rows are those of `bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from profiles.bench import bundle_worker, labelled, of_one_run
from profiles.process import Worker
from profiles.protocol import Hello, Metric
from profiles.rows import Row
from profiles.task import profile_tasks
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineUnavailable
from runtime.placing.advice import Advice, advise
from runtime.placing.containers import allowance
from runtime.placing.devices import detect
from runtime.placing.loading import choose_target
from runtime.placing.measured import Collected
from runtime.placing.nearest import WAYS
from runtime.timing import turns

Say = Callable[[str], None]
REPEAT: Final = 3
"""Repetitions that count."""


@dataclass(frozen=True)
class Tuning:
    """What is measured: the bundle, its usable targets, the settings of its task, and how often."""

    bundle: Bundle
    targets: Sequence[str]
    settings: Mapping[str, Any]
    repeat: int = REPEAT
    say: Say = lambda line: None

    @classmethod
    def of(cls, bundle: Bundle, named: Sequence[str], repeat: int, say: Say) -> Tuning:
        """The bundle on the named targets, else on all that can be used here. Raises EngineUnavailable if none can."""
        usable, reasons = list[str](), list[str]()
        for name in named or bundle.targets:
            try:
                usable.append(choose_target(bundle, name).target)
            except EngineUnavailable as error:
                if named:
                    raise
                reasons.append(str(error))
        if not usable:
            choose_target(bundle)  # says why none is usable
        for reason in reasons:
            say(reason)
        return cls(bundle, usable, profile_tasks()[bundle.manifest.task].tuning, repeat, say)

    def rows(self) -> Iterator[list[Row]]:
        """The rows of each part, when it is done: targets in turns, threads of the fastest in turns, calls together.

        Raises EngineError where a worker fails.
        """
        found = self._turns([self._job(name) for name in self.targets])
        yield found
        best = self._advice(found).order(self.targets)[0]
        jobs = [self._job(best, threads) for threads in (0, *fewer(allowance().threads))]
        if len(jobs) > 1:
            more = self._turns(jobs)
            yield more
            found = [*found, *more]
        decided = self._advice(found).threads(best)
        yield self._together(self._job(best, int(decided.value) if decided else 0))

    def _job(self, target: str, threads: int = 0) -> Job:
        return Job(bundle=self.bundle.root, target=target, threads=threads, settings=self.settings)

    def _turns(self, jobs: Sequence[Job]) -> list[Row]:
        """The metrics that whole models are compared by, of workers in turns."""

        def compared(known: Mapping[str, Metric]) -> tuple[str, ...]:
            return next((way.metrics for way in WAYS if set(way.metrics) <= known.keys()), ())

        return self._measured([bundle_worker(job) for job in jobs], compared)

    def _together(self, job: Job) -> list[Row]:
        """Calls of submodels with more and fewer rows, in turns."""
        return self._measured([Worker([sys.executable, "-m", "profiles.rowed", job.model_dump_json()])], tuple)

    def _measured(
        self, workers: Sequence[Worker], choose: Callable[[Mapping[str, Metric]], tuple[str, ...]]
    ) -> list[Row]:
        with ExitStack() as stack:
            entered = [stack.enter_context(worker) for worker in workers]
            known = entered[0].hello["metrics"]
            parts = [(worker, metric) for metric in choose(known) for worker in entered]
            values = turns([partial(worker.measure, metric) for worker, metric in parts], self.repeat)
            found = [
                self._row(worker.hello, metric, taken) for (worker, metric), taken in zip(parts, values, strict=True)
            ]
        return of_one_run(found)

    def _row(self, hello: Hello, name: str, values: Sequence[float]) -> Row:
        metric = hello["metrics"][name]
        settings = metric.get("settings", {})
        row = labelled(self.bundle, hello, metric.get("name", name), metric["unit"], values, None, settings)
        self.say(f"{name} on {row.target}, {row.threads} threads: {row.spread.median:.4g} {row.unit}")
        return row

    def _advice(self, rows: Sequence[Row]) -> Advice:
        return advise(self.bundle.manifest, detect(), Collected(tuple(rows)))


def fewer(threads: int) -> tuple[int, ...]:
    """Numbers of threads to try besides all: the half of them, and of many the quarter."""
    return tuple(threads // part for part in (2, 4) if threads // part >= (1 if part == 2 else 4))
