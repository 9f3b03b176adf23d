"""One request run to its end on a model, with its calls observed on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from calibration.ground.progress import followed
from runtime.pipeline import Call, Event, Outputs, drive, tap
from runtime.placing.loading import LoadedModel

MAX_TOKENS: Final = 32
"""New tokens of an answer that is compared."""
Observer = Callable[[Call, Outputs], Outputs]
"""Sees each call and its outputs; the pipeline continues with the outputs that it returns."""


@dataclass(frozen=True)
class Ran:
    """The events of a request."""

    events: list[Event]

    def one(self, kind: type[Any]) -> Any:
        """The one event of that kind."""
        (event,) = (event for event in self.events if isinstance(event, kind))
        return event


def run(model: LoadedModel, request: Any, observer: Observer | None = None) -> Ran:
    """Run a request to its end."""
    pipeline = model.pipeline(request)
    watched = tap(pipeline, observer) if observer else pipeline
    return Ran(list(followed(drive(watched, model.engines), MAX_TOKENS)))
