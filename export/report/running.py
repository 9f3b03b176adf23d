"""One request run to its end on a model, with its calls observed on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from calibration.ground.progress import followed
from runtime.pipeline import Call, Event, Outputs, Pipeline, drive
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
    watched = _observed(pipeline, observer) if observer else pipeline
    return Ran(list(followed(drive(watched, model.engines), MAX_TOKENS)))


def _observed(pipeline: Pipeline, observer: Observer) -> Pipeline:
    """The same pipeline, but each call is answered with what the observer makes of its outputs."""
    outputs: Outputs | None = None
    try:
        while True:
            item = pipeline.send(outputs)
            outputs = yield item
            if isinstance(item, Call):
                assert outputs is not None, "a driver answers a call with its outputs"
                outputs = observer(item, outputs)
    except StopIteration:
        return
    finally:
        pipeline.close()
