"""What a build compares, times and requires of models of one task.

One file per task in `export/tasks/`, found by listing it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import export.tasks
from export.report.measured import ComparedByName, Floor, Measure, Measured
from runtime.bundle.manifest import Bundle
from runtime.listing import modules
from runtime.pipeline import Pipeline
from runtime.placing.loading import LoadedModel
from runtime.vision.images import Picture

Pictures = dict[str, Picture]
"""Pictures by their path in the bundle."""

FOLDER: Final = "quality"
"""Where a bundle keeps what was compared."""
SEED: Final = 1000
"""Compared requests are drawn from this seed and those after it. Calibration begins at 0 and stays far below."""


@dataclass(frozen=True)
class Effort:
    """How much is compared: `pictures` and `questions` that the report shows, and `cases` of the checkpoint's exam.

    `steps` of each picture; None is as many as the model's users get.
    """

    pictures: int = 4
    steps: int | None = None
    questions: int = 8
    cases: int = 16


@dataclass(frozen=True)
class SpeedEffort:
    """How much is timed: `turns` that count, fewer once `seconds` have passed, and the request.

    That has `steps` of a picture (None is as many as the model's users get) or new `tokens` of an answer.
    """

    turns: int = 9
    seconds: float = 4
    steps: int | None = 4
    tokens: int = 16


THOROUGH: Final = SpeedEffort(turns=15, seconds=120, steps=None, tokens=64)


class Comparison(ABC):
    """How models of one task are compared.

    `name` is the task's in `runtime.tasks`. quality.json keeps results of the class `result` under the name `stored`;
    `noun` names what one is of. A file `<task>.html` beside the task's own is its part of the report's page: the jinja2
    macros `tiles`, `section` and `terms`, which use what `shown` gives, `results` and the page's own variables.
    """

    name: ClassVar[str]
    stored: ClassVar[str]
    result: ClassVar[type[Measured]]
    noun: ClassVar[str]
    measure: ClassVar[Measure]
    floors: ClassVar[tuple[Floor, ...]]

    @property
    def page(self) -> str:
        """The template of the task's part of the report's page."""
        return Path(inspect.getfile(type(self))).with_suffix(".html").read_text(encoding="utf-8")

    @abstractmethod
    def wanted(self, effort: Effort) -> int:
        """How many requests are compared."""

    @abstractmethod
    def general(self) -> Iterator[Any]:
        """Requests for any model; none of them is calibrated with."""

    @abstractmethod
    def comparing(self, request: Any, number: int, effort: Effort) -> Any:
        """Request `number` (from 0) as both models get it: the same seed, a bounded length."""

    @abstractmethod
    def compare(
        self,
        number: int,
        request: Any,
        quantized: LoadedModel,
        reference: LoadedModel,
        pictures: Pictures,
        compared: ComparedByName,
    ) -> Measured:
        """Run a request on both models. Adds the pictures of the report, and calls of submodels that keep states."""

    @abstractmethod
    def figure(self, results: Sequence[Any]) -> float:
        """The `measure` of all results together."""

    @abstractmethod
    def summary(self, results: Sequence[Any]) -> dict[str, float]:
        """Other figures for the manifest."""

    @abstractmethod
    def shown(self, bundle: Bundle, results: Sequence[Any]) -> dict[str, Any]:
        """What the task's part of the page needs to show the results. Raises BundleError."""

    @abstractmethod
    def timed(self, model: LoadedModel, effort: SpeedEffort) -> tuple[Pipeline, str]:
        """A pipeline that is about to carry out the request that is timed, and a description of the request."""


@cache
def comparisons() -> Mapping[str, Comparison]:
    """Every task by name."""
    return {module.TASK.name: module.TASK for module in modules(export.tasks)}
