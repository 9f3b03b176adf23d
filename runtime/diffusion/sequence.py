"""Several requests of one caller as one pipeline: they run one after another, and count as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from runtime.pipeline import Event, Pipeline, Progress, through
from runtime.tasks.image import ImageReady, ImageRequest


def in_turn(make: Callable[[Any], Pipeline], requests: Sequence[ImageRequest]) -> Pipeline:
    """The pipeline of requests for pictures, each made when its turn comes. Steps and pictures are counted over all of
    them. All are checked before: raises InvalidInput.
    """
    for request in requests:
        make(request).close()
    return _run(make, requests)


def _run(make: Callable[[Any], Pipeline], requests: Sequence[ImageRequest]) -> Pipeline:
    counts = _Counts()
    for place, request in enumerate(requests):
        yield from through(make(request), partial(counts.counted, requests[place + 1 :]))
        counts.add()


class _Counts:
    """What the requests that have ended took, and the present one takes."""

    def __init__(self) -> None:
        self._steps = self._pictures = self._total = self._ready = 0

    def counted(self, later: Sequence[ImageRequest], event: Event) -> Iterator[Event]:
        match event:
            case Progress(step, total, preview):
                self._total = total
                expected = sum(one.all_steps or total for one in later)
                yield Progress(self._steps + step, self._steps + total + expected, preview)
            case ImageReady(index=index):
                self._ready += 1
                yield replace(event, index=self._pictures + index)
            case _:
                yield event

    def add(self) -> None:
        """The present request has ended."""
        self._steps, self._pictures = self._steps + self._total, self._pictures + self._ready
        self._total = self._ready = 0
