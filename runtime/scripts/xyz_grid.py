"""Draws a grid of pictures along up to three parameters as one request: the labelled picture comes back, and the cells
behind it where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final

import numpy as np
from pydantic import BeforeValidator, Field

from runtime import limits
from runtime.diffusion.sequence import in_turn
from runtime.errors import InvalidInput
from runtime.grid.picture import grid_picture
from runtime.grid.plan import NAMES, GridPlan
from runtime.pipeline import Event, Note, Pipeline, through
from runtime.script import Arguments, Make, Script
from runtime.tasks.image import ImageReady, ImageRequest


class AxisArguments(Arguments):
    """A field and its values, as text such as "10,20" or as a list."""

    field: str
    values: str | list[Any]


def _parsed(given: Any) -> Any:
    """A text is FIELD=VALUES."""
    if not isinstance(given, str):
        return given
    field, equals, values = given.partition("=")
    if not equals:
        raise ValueError(f"is {given!r:.100}, expected FIELD=VALUES such as steps=10,20")
    return {"field": field.strip(), "values": values}


AxisGiven = Annotated[AxisArguments | None, BeforeValidator(_parsed)]


class GridArguments(Arguments):
    """The axes: columns, rows and blocks. With `cells`, the picture of each cell follows that of the grid."""

    x: AxisGiven = Field(default=None, description="columns: FIELD=VALUES such as steps=10,20")
    y: AxisGiven = Field(default=None, description="rows, likewise")
    z: AxisGiven = Field(default=None, description="blocks beside each other, likewise")
    cells: bool = Field(default=False, description="true: the picture of each cell behind that of the grid")


class XYZGrid(Script[GridArguments]):
    """Draws the cells one after another, and the page of all of them at the end."""

    summary: ClassVar[str] = "Draw a grid of pictures along up to three parameters (X/Y/Z plot)."
    takes: ClassVar[type[Arguments]] = GridArguments
    tasks: ClassVar[tuple[str, ...]] = (ImageRequest.task,)

    def open(self, request: ImageRequest, make: Make) -> Pipeline:
        given = {name: getattr(self.arguments, name) for name in NAMES}
        axes = {name: None if axis is None else (axis.field, axis.values) for name, axis in given.items()}
        plan = GridPlan.of(request, axes)
        steps = sum(cell.all_steps or 0 for cell in plan.cells)
        if steps > limits.ALL_STEPS.most:
            raise InvalidInput(
                "steps", f"of all cells are {steps:,}, expected at most {limits.ALL_STEPS.most:,} in one request"
            )
        return self._page(plan, in_turn(make, plan.cells))

    def _page(self, plan: GridPlan, pipeline: Pipeline) -> Pipeline:
        drawn = list[ImageReady]()

        def kept(event: Event) -> Iterator[Event]:
            if not isinstance(event, ImageReady):
                yield event
                return
            drawn.append(event)  # and count, before the rest is drawn and held
            limits.PICTURE_PIXELS.count("grid", sum(one.image.shape[0] * one.image.shape[1] for one in drawn))

        yield from through(pipeline, kept)
        assert plan.request.seed is not None, "a plan has a seed"
        page = grid_picture(plan, [np.asarray(one.image, np.uint8) for one in drawn])
        yield Note(", ".join(f"{name}: {value}" for name, value in plan.facts().items()))
        yield ImageReady(page, 0, plan.request.seed)
        for index, one in enumerate(drawn if self.arguments.cells else (), start=1):
            yield replace(one, index=index)


SCRIPT: Final = XYZGrid
