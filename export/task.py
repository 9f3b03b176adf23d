"""How a build compares and times models of one task, and the floors that they must reach.

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
"""Folder of a bundle with the results of its comparison."""
SEED: Final = 1000
"""Seed of the first compared request; each further one adds 1. Calibration uses much smaller seeds, from 0."""


@dataclass(frozen=True)
class Effort:
    """How much is compared: the numbers of `pictures` and `questions` of the report and of `cases` of the checkpoint's
    exam. `steps` are those of each picture; None is the model's default.
    """

    pictures: int = 4
    steps: int | None = None
    questions: int = 8
    cases: int = 16


@dataclass(frozen=True)
class SpeedEffort:
    """How much is timed: `turns` after the warm-up, fewer once `seconds` have passed.

    The request is a picture of `steps` steps (None is the model's default) or an answer of `tokens` new tokens.
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
        """Requests for any model of the task. Calibration uses none of them."""

    @abstractmethod
    def comparing(self, request: Any, number: int, effort: Effort) -> Any:
        """Request `number` (from 0) as both models run it: with a fixed seed and a limited length."""

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
        """Run a request on both models. Adds pictures for the report to `pictures`, and calls of submodels with states
        to `compared`.
        """

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
        """The pipeline of the timed request, not yet started, and a description of the request."""


@cache
def comparisons() -> Mapping[str, Comparison]:
    """Every task by name."""
    return {module.TASK.name: module.TASK for module in modules(export.tasks)}
