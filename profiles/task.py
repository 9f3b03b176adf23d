"""What is measured of the models of a task. One file per task in `profiles/tasks/`, found by listing the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

import profiles.tasks
from calibration.requests.exams import Case
from profiles.exam import ExamSettings, Subject
from runtime.bundle.manifest import Bundle, Frozen
from runtime.listing import modules
from runtime.pipeline import Event
from runtime.placing.loading import LoadedModel
from runtime.task import Request

if TYPE_CHECKING:
    from profiles.probes import Probe


@dataclass(frozen=True)
class TaskExam:
    """How models of a task take an exam.

    `reads` says whether a folder holds a checkpoint of the task, and `source` makes it a subject, run by its own
    library, with what an exam adds to it (`Exam.additions`). `settings` completes the options of `score`, which are
    None where they are not given: it takes the source, the bundles, the number of cases and the options. `results` runs
    cases on a loaded bundle.
    """

    reads: Callable[[Path], bool]
    source: Callable[[Path, Mapping[str, Mapping[str, Path]]], Subject]
    settings: Callable[[Path | None, Sequence[Path], int, Mapping[str, Any]], ExamSettings]
    results: Callable[[LoadedModel, Sequence[Case], Any], Iterable[Any]]


@dataclass(frozen=True)
class Requests:
    """Requests that a server is loaded with. `request` makes that of a number; all are alike, but nothing that a server
    keeps of one helps another. `amount` is what an event adds to an answer, in the unit before the slash of `unit`.
    """

    request: Callable[[int], Request]
    amount: Callable[[Event], float]
    unit: str
    settings: Mapping[str, int | float | str]


@dataclass(frozen=True)
class Rate:
    """How fast several requests run together: `run` measures it once, in `unit`, such as tokens/s of all of them."""

    unit: str
    run: Callable[[], float]
    settings: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """What `bench --suite` measures besides the metrics of a model: `batches` of requests that run together, closed
    loads of so many `clients` on a server, and `starts`, how often it is loaded cold and warm. `settings` are the
    task's where the command line has none.

    A metric is repeated `repeat` times, or 3 times if those take longer than `budget` seconds.
    """

    repeat: int
    budget: float
    batches: tuple[int, ...]
    clients: tuple[int, ...]
    starts: int
    settings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileTask:
    """What is measured of the models of one task. A file in `profiles/tasks/` declares one as `TASK`.

    `does` is a verb for messages, as in "a model that draws". `options` are the options of `bench` and `score` that
    apply to such models alone; those of `bench` are fields of `settings`. Submodels are measured with the calls that
    `request` makes for a model; `probes` are those of the whole model. Both raise InvalidInput where it refuses the
    settings. `exam` is None for a task without exams, and `load`, which makes the requests that a server of a bundle is
    loaded with, for one whose servers are not measured. `batched` measures so many requests that run together, None
    where the algorithm has no such thing. `suites` are those of `bench --suite`, by name;
    `tuning` are the settings of the short requests of `tune`.
    """

    task: str
    does: str
    options: frozenset[str]
    settings: type[Frozen]
    request: Callable[[LoadedModel, Any], Request]
    probes: Callable[[LoadedModel, Any], list[Probe]]
    exam: TaskExam | None = None
    load: Callable[[Bundle, Any], Requests] | None = None
    batched: Callable[[LoadedModel, Any, int], Rate] | None = None
    suites: Mapping[str, Suite] = field(default_factory=dict)
    tuning: Mapping[str, JsonValue] = field(default_factory=dict)


@cache
def profile_tasks() -> dict[str, ProfileTask]:
    """Every task that is measured, by name."""
    found = [module.TASK for module in modules(profiles.tasks)]
    return {task.task: task for task in found}
