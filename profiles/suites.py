"""Suites: everything that is measured of a bundle, one command for all of it. Each task declares its own
(`profiles.task.Suite`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from profiles import bench
from profiles.bench import BenchPlan, Say
from profiles.roofline import bounds
from profiles.roofline.rates import roofline
from profiles.rows import Row
from profiles.serving import bench as serving
from profiles.serving.load import CLOSED, Load
from profiles.serving.worker import Job as Served
from profiles.starts import starts
from profiles.task import Suite, profile_tasks
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput, MissingDependency, did_you_mean

EACH: Final = 2
"""Requests of each client of a load."""
LOADS: Final = 3
"""Repetitions of a load at most: each is many requests."""


@dataclass(frozen=True)
class Subject:
    """A bundle, the targets that it is measured on, and how."""

    bundle: Bundle
    targets: Sequence[str]
    threads: int
    settings: Mapping[str, Any]


def suite_of(bundle: Bundle, name: str) -> Suite:
    """The suite of that name of the bundle's task. Raises InvalidInput where it has none."""
    task = profile_tasks()[bundle.manifest.task]
    if name not in task.suites:
        reason = did_you_mean(name, task.suites) if task.suites else "it has none"
        raise InvalidInput("suite", f"'{name}' is none of task {task.task}: {reason}")
    return task.suites[name]


def measure(subject: Subject, suite: Suite, say: Say = lambda line: None) -> list[Row]:
    """All rows of a suite: starts of each target, the metrics of all in turns, the machine's limits, then loads on
    servers. Raises EngineError, and InvalidInput where the model refuses the settings.
    """
    bundle, settings = subject.bundle, dict(suite.settings) | dict(subject.settings)
    jobs = [
        Job(bundle=bundle.root, target=target, threads=subject.threads, settings=settings, batches=suite.batches)
        for target in subject.targets
    ]
    rows = [row for job in jobs for row in starts(job, suite.starts, say)]
    plan = BenchPlan(suite.repeat, budget=suite.budget)
    measured = bench.bench(bundle, map(bench.bundle_worker, jobs), plan, say)
    limits = _limits(subject, say)
    counts = bounds.counted(jobs[0]) if limits else []
    rows += [*bounds.bounded(measured, bundle, counts, limits), *counts, *limits]
    if suite.clients and profile_tasks()[bundle.manifest.task].load is not None:
        rows += _served(subject, settings, suite, say)
    return rows


def _limits(subject: Subject, say: Say) -> list[Row]:
    """The roofline; none, said, where its products cannot be made."""
    try:
        return roofline(subject.targets, subject.threads, say)
    except MissingDependency as error:
        say(f"the machine's limits are left out: {error}")
        return []


def _served(subject: Subject, settings: Mapping[str, Any], suite: Suite, say: Say) -> list[Row]:
    """Throughput of a server of the bundle against concurrency."""
    loads = tuple(Load(CLOSED, clients, EACH * clients) for clients in suite.clients)
    jobs = [
        Served(
            bundle=subject.bundle.root,
            target=target,
            threads=subject.threads,
            parallel=max(suite.clients),
            settings=settings,
        )
        for target in subject.targets
    ]
    plan = serving.LoadPlan(loads, min(suite.repeat, LOADS))
    return serving.bench(subject.bundle, map(serving.server_worker, jobs), plan, say)
