"""A grid of pictures: a request, and up to three axes along which it changes. Each cell is a request of its own."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Final

from runtime import limits
from runtime.errors import InvalidInput
from runtime.grid.axes import Axis
from runtime.tasks.image import ImageRequest

NAMES: Final = ("x", "y", "z")
"""The axes: columns, rows, and blocks beside each other."""
ALONE: Final = Axis("", ("",))
"""Stands for an axis that a grid does not have."""


@dataclass(frozen=True)
class GridPlan:
    """The cells of a grid from a `request` and its `axes` by name, "x", "y" and "z". Raises InvalidInput.

    All cells have the same seed, unless it is on an axis: the request's, or one that is chosen. A cell draws what its
    request draws alone.
    """

    request: ImageRequest
    axes: Mapping[str, Axis]

    def __post_init__(self) -> None:
        if unknown := self.axes.keys() - set(NAMES):
            raise InvalidInput(min(unknown), "is no axis of a grid, expected x, y or z")
        if not self.axes:
            raise InvalidInput("x", "is missing: a grid has one axis at least, such as steps=10,20")
        names = [axis.field for axis in self.axes.values()]
        for name in (name for name, axis in self.axes.items() if names.count(axis.field) > 1):
            raise InvalidInput(name, f"has the field {self.axes[name].field} of another axis: choose another one")
        if self.request.images != 1:
            raise InvalidInput("images", f"is {self.request.images}: each cell of a grid is one picture")
        for field in ("denoising_end", "denoising_start"):
            if getattr(self.request, field) is not None:
                raise InvalidInput(field, "has no place in a grid, whose cells are whole pictures")
        columns, rows, blocks = self.shape
        limits.GRID_CELLS.count("grid", columns * rows * blocks)
        if self.request.seed is None:
            object.__setattr__(self, "request", replace(self.request, seed=secrets.randbits(32)))

    @classmethod
    def of(cls, request: ImageRequest, axes: Mapping[str, tuple[str, str | Sequence[Any]] | None]) -> GridPlan:
        """From fields and values by the name of their axis; an axis that is None is left out. Raises InvalidInput."""
        return cls(request, {name: Axis.of(name, *given) for name, given in axes.items() if given is not None})

    def axis(self, name: str) -> Axis:
        """An axis; one without a name or a label where the grid has none."""
        return self.axes.get(name, ALONE)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of columns, rows and blocks."""
        x, y, z = (len(self.axis(name).values) for name in NAMES)
        return x, y, z

    @cached_property
    def cells(self) -> tuple[ImageRequest, ...]:
        """The request of each cell: row after row of the first block, then those of the next. Raises InvalidInput where
        a value is none that a request may have.
        """
        return tuple(
            self._cell(dict(zip(NAMES, (x, y, z), strict=True)))
            for z, y, x in product(*(self.axis(name).values for name in reversed(NAMES)))
        )

    def _cell(self, values: Mapping[str, Any]) -> ImageRequest:
        request = self.request
        for name in (name for name in NAMES if name in self.axes):
            request = self.axes[name].changed(name, request, values[name])
        return request

    def facts(self) -> dict[str, str]:
        """What a grid says of itself beside the parameters of its request, as Automatic1111's X/Y/Z plot does."""
        found = {"Script": "X/Y/Z plot"}
        for name, axis in self.axes.items():
            found |= {f"{name.upper()} Type": axis.field, f"{name.upper()} Values": axis.text()}
        return found
