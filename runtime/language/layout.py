"""How a picture becomes positions of a prompt. One file per layout in `runtime/language/layouts/`, found by listing the
folder.

    picture --tiles--> pixel_values [tiles, 3, height, width] --vision encoder--> features [tiles, patches, hidden]
            --pack--> embeddings [positions, hidden]

A picture may take any number of tiles and positions; both depend on its size alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

import runtime.language.layouts
from runtime.bundle.signature import Array
from runtime.errors import BundleError, did_you_mean
from runtime.listing import modules
from runtime.vision.images import Picture, PictureFile, lengths


class Size(NamedTuple):
    """Of a picture, in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, picture: Picture | PictureFile) -> Size:
        return cls(*lengths(picture))


class Layout(ABC):
    """The layout of one model. `name` is what `ChatConfig.layout` says."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def open(cls, root: Path, patches: int, options: Mapping[str, Any]) -> Self:
        """From the folder of the model's files, the features that the encoder gives for a tile, and
        `ChatConfig.layout_options`. Raises BundleError.
        """

    @property
    @abstractmethod
    def origin(self) -> str:
        """The file and field that say how large a tile is. For messages."""

    @abstractmethod
    def check(self, size: Size, field: str) -> None:
        """Raise InvalidInput naming `field` for a picture whose size has no layout."""

    @abstractmethod
    def positions(self, size: Size) -> int:
        """How many positions of the prompt a picture takes: its placeholder tokens."""

    @abstractmethod
    def tiles(self, picture: Picture | PictureFile, field: str) -> NDArray[np.float32]:
        """What the encoder gets of a picture, [tiles, 3, height, width]. Raises InvalidInput naming `field`."""

    @abstractmethod
    def pack(self, features: Array, size: Size) -> Array:
        """The embeddings [positions, hidden] of a picture, from the features [tiles, patches, hidden] of its tiles."""


@cache
def layouts() -> dict[str, type[Layout]]:
    """Every layout by name: the classes in `runtime/language/layouts/`."""
    found = [
        each
        for module in modules(runtime.language.layouts)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Layout) and each.__module__ == module.__name__
    ]
    return {layout.name: layout for layout in found}


def layout_named(name: str) -> type[Layout]:
    """Raises BundleError with the nearest name."""
    if name not in layouts():
        raise BundleError(f"the chat settings name the layout '{name}': {did_you_mean(name, layouts())}")
    return layouts()[name]
