"""What an open page has drawn: one request, or the cells of a grid, each a request of its own, and what to show of it
after every event.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np

from runtime import limits
from runtime.errors import InvalidInput
from runtime.grid.picture import grid_picture
from runtime.grid.plan import NAMES, GridPlan
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.python.grid import GridDrawing, Kept
from serving.dialects.python.requests import going_on
from serving.dialects.python.results import drawing
from serving.host.job import Done, Queued
from serving.page import lines
from serving.page.backend import Visitor
from serving.page.parts import Page
from serving.page.pictures import fresh, parameters, saved

CELLS: Final = "cells"
"""The folder of cells, in that of the page."""
GRID: Final = "grid"
"""What stands below the labelled picture of a grid."""
Pictures = list[tuple[str, str]]
"""Files of pictures, with what stands below each."""


@dataclass(frozen=True)
class Step:
    """What to show from now on: a line, a preview, the pictures that are there, and the parameters of one of them. What
    is None stays. Further pictures are to come if they are not `last`.
    """

    line: str
    preview: Any = None
    pictures: Pictures | None = None
    text: str | None = None
    last: bool = False


class Work:
    """Drawing with a model for a visitor of a tab."""

    def __init__(self, page: Page, visitor: Visitor, tab: str, model: str) -> None:
        self._page, self._visitor, self._tab, self._model = page, visitor, tab, model

    async def pictures(self, request: ImageRequest) -> AsyncGenerator[Step, None]:
        """Draw a request. Raises its errors."""
        async with aclosing(self._drawn(request, self._model, request, {"Model": self._model})) as steps:
            async for step in steps:
                yield step

    async def refined(
        self, request: ImageRequest, refiner: str, scores: Mapping[str, float]
    ) -> AsyncGenerator[Step, None]:
        """Draw a request with `denoising_end`, and let another model go on, which takes `scores`. Raises the errors of
        both.
        """
        begun = list[Event]()
        async with aclosing(self._events(request)) as events:
            async for event in events:
                begun.append(event)
                if (step := _waiting(event, f"{self._model}: ")) is not None:
                    yield step
        later = going_on(request, drawing(begun), **scores)
        facts = {"Model": self._model, "Refiner": refiner, "Refiner switch at": f"{request.denoising_end:g}"}
        async with aclosing(self._drawn(later, refiner, request, facts)) as steps:
            async for step in steps:
                yield step

    async def _drawn(
        self, request: ImageRequest, model: str, stated: ImageRequest, facts: Mapping[str, str]
    ) -> AsyncGenerator[Step, None]:
        """Draw a request, and write its pictures with the parameters that were `stated`."""
        found: Pictures = []
        async with aclosing(self._events(request, model)) as events:
            async for event in events:
                if isinstance(event, ImageReady):
                    path, text = await asyncio.to_thread(saved, self._page.folder, stated, event, facts)
                    found.append((str(path), f"seed {event.seed}"))
                    line = lines.line(f"{_counted(len(found))} of {request.images}")
                    yield Step(line, pictures=list(found), text=text, last=len(found) >= request.images)
                elif isinstance(event, Done):
                    yield Step(lines.done(event, _counted(len(found))), last=True)
                elif (step := _waiting(event)) is not None:
                    yield step

    async def grid(self, plan: GridPlan) -> AsyncGenerator[Step, None]:
        """Draw the cells of a grid that are not kept, and the page of all. Raises the errors of the requests, and
        that of a visitor who may not draw, also where all cells are kept.
        """
        self._page.backend.check(ImageRequest.task, self._visitor)
        requests, labels = plan.cells, _labels(plan)
        kept = Kept(fresh(self._page.folder / CELLS), self._page.backend.identity(self._model))
        found: Pictures = []
        pixels = 0
        for number, request in enumerate(requests, start=1):
            place = f"cell {number} of {len(requests)}: "
            if (picture := await asyncio.to_thread(kept.get, request)) is None:
                async with aclosing(self._events(request)) as events:
                    async for event in events:
                        if isinstance(event, ImageReady):
                            picture = np.asarray(event.image, np.uint8)
                            await asyncio.to_thread(kept.put, request, picture, event.seed)
                        elif (step := _waiting(event, place)) is not None:
                            yield step
            assert picture is not None, "a request that has not failed has drawn a picture"
            pixels += math.prod(picture.shape[:2])
            limits.PICTURE_PIXELS.count("grid", pixels)
            found.append((str(kept.file(request)), labels[number - 1]))
            yield Step(lines.line(f"{place}there"), pictures=list(found))
        path = await asyncio.to_thread(self._whole, plan, kept)
        text = await asyncio.to_thread(parameters, path)
        yield Step(lines.line(f"a grid of {len(found)} cells", "done"), None, [(str(path), GRID), *found], text, True)

    def _whole(self, plan: GridPlan, kept: Kept) -> Path:
        """The file of the labelled picture. Raises InvalidInput where a cell is not there any more."""
        cells = [kept.get(request) for request in plan.cells]
        there = tuple(cell for cell in cells if cell is not None)
        if len(there) < len(cells):
            raise InvalidInput("grid", "has cells that were removed meanwhile: draw it again")
        whole = GridDrawing(plan, grid_picture(plan, there), there)
        return whole.save(fresh(self._page.folder) / f"grid-{uuid4().hex}.png")

    def _events(self, request: ImageRequest, model: str = "") -> AsyncGenerator[Event, None]:
        return self._page.runs.events(self._visitor, self._tab, model or self._model, request)


def _counted(pictures: int) -> str:
    return "a picture" if pictures == 1 else f"{pictures} pictures"


def _waiting(event: Event, place: str = "") -> Step | None:
    """What to show while a picture is not there."""
    if isinstance(event, Queued):
        return Step(lines.queued(event, place))
    if isinstance(event, Progress):
        return Step(lines.progress(event, place), event.preview)
    return None


def _labels(plan: GridPlan) -> list[str]:
    """What stands below each cell: its values."""
    x, y, z = (plan.axis(name).labels() for name in NAMES)
    return [" · ".join(label for label in (one, two, three) if label) for three in z for two in y for one in x]
