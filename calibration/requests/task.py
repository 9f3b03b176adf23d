"""What calibration must know of a task. One file per task in `calibration/requests/tasks/`, found by listing it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import calibration.requests.tasks
from runtime.listing import modules
from runtime.pipeline import Call, Event
from runtime.vision.images import Picture

Beside = Callable[[Event], Iterable[Call]]
"""The calls that follow from an event of a request, beside those of its pipeline."""


class TaskRequests(ABC):
    """How requests of one task are made. `name` is the task's in `runtime.tasks`.

    `calls` is about how often a request calls its largest submodel while calibrating, `brief_calls` the same of a
    brief request.
    """

    name: ClassVar[str]
    calls: ClassVar[float]
    brief_calls: ClassVar[float]

    @abstractmethod
    def general(self, seed: int) -> Iterator[Any]:
        """Requests of many kinds for any model, without end."""

    @abstractmethod
    def calibrating(self, request: Any, number: int, seed: int) -> Any:
        """Request `number` (from 0) as it is run while calibrating: short, and with a seed of its own."""

    @abstractmethod
    def brief(self, request: Any, number: int) -> Any:
        """The same for models of which each call takes many seconds."""

    @abstractmethod
    def of_prompt(self, text: str, number: int) -> Any:
        """A request for one of the user's prompts."""

    @abstractmethod
    def of_picture(self, picture: Picture, caption: Callable[[], str], number: int) -> tuple[Any, Picture | None]:
        """A request for one of the user's pictures, and the picture where the model's image encoder is to see it.

        `caption` reads the file beside the picture. Raises InvalidInput.
        """

    @abstractmethod
    def of_question(self, picture: Picture, question: str) -> Any:
        """A request for a question about a picture."""

    def fitted(self, config: Mapping[str, Any], request: Any) -> Any:
        """The request with what a model with this config takes besides, so that calls of all its submodels are seen.
        `config` is the pipeline's.
        """
        return request

    def check_questions(self) -> None:
        """Raise InvalidInput where questions do not apply to this task."""

    def beside(self, config: Mapping[str, Any], picture: Picture | None, name: str) -> tuple[Sequence[Call], Beside]:
        """Calls that no pipeline of the task makes, to calibrate their submodels with: at once, and after each event.

        `config` is the pipeline's; `picture` came with the request called `name`. Raises InvalidInput.
        """
        return (), lambda event: ()

    def uncovered(self, positions: Mapping[str, Sequence[int]]) -> list[str]:
        """What a calibration set lacks, each in one sentence. `positions` says for each submodel how many of its calls
        are the first, second, ... of their request.
        """
        return []

    @abstractmethod
    def result(self, events: Iterable[Event]) -> Any:
        """What a request gave in the end."""


@cache
def task_requests() -> Mapping[str, TaskRequests]:
    """Every task by name."""
    return {module.TASK.name: module.TASK for module in modules(calibration.requests.tasks)}
