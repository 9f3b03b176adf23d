"""How the toy task is calibrated: with normal numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, Final

import numpy as np
from runtime.tasks.scale import Scaled, ScaleRequest

from calibration.requests.task import TaskRequests
from runtime.errors import InvalidInput
from runtime.pipeline import Event
from runtime.vision.images import Picture


class Scale(TaskRequests):
    name = ScaleRequest.task
    calls = 3
    brief_calls = 3

    def general(self, seed: int) -> Iterator[ScaleRequest]:
        for number in count():
            rng = np.random.default_rng([seed, number])
            yield ScaleRequest(tuple(map(float, rng.standard_normal(16))))

    def calibrating(self, request: ScaleRequest, number: int, seed: int) -> ScaleRequest:
        return request

    def brief(self, request: ScaleRequest, number: int) -> ScaleRequest:
        return request

    def of_prompt(self, text: str, number: int) -> Any:
        raise InvalidInput("prompts", "are no numbers")

    def of_picture(self, picture: Picture, caption: Callable[[], str], number: int) -> Any:
        raise InvalidInput("images", "are no numbers")

    def of_question(self, picture: Picture, question: str) -> Any:
        raise InvalidInput("questions", "are no numbers")

    def result(self, events: Iterable[Event]) -> tuple[float, ...]:
        (scaled,) = (event for event in events if isinstance(event, Scaled))
        return scaled.numbers


TASK: Final = Scale()
