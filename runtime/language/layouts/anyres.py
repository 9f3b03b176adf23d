"""Pictures of any resolution: the whole picture as one tile, and the picture once more, cut into the tiles of the grid
that fits it best: LLaVA-NeXT (Liu et al. 2024, https://llava-vl.github.io/blog/2024-01-30-llava-next/).

The features of the grid's tiles are put together to one map. What lies in the padding is cut off, and a learned
embedding ends each line. Steps and roundings are those of transformers' LlavaNextImageProcessor and
`LlavaNextModel.pack_image_features`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import Array
from runtime.bundle.tensors import read_tensor
from runtime.errors import BundleError, InvalidInput
from runtime.language.layout import Layout, Size
from runtime.vision import preprocessing
from runtime.vision.images import Picture, PictureFile, check_picture
from runtime.vision.preprocessing import ImagePreprocessor

NEWLINE: Final = "image_newline"
"""The tensor of the checkpoint that ends each line of features, [hidden]."""
CLASSES: Final = {"LlavaNextImageProcessor": preprocessing.CLIP}
Length = Annotated[int, Field(ge=1, le=1 << 16)]


class Options(Frozen):
    """`grids` are the heights and widths in pixels that a picture may be resized to, multiples of a tile's edge."""

    grids: Annotated[tuple[tuple[Length, Length], ...], Field(min_length=1)]


@dataclass(frozen=True)
class Anyres(Layout):
    """`side` is how many features a tile has along each edge; `newline` [hidden] ends each line of the map."""

    name: ClassVar[str] = "anyres"
    preprocessor: ImagePreprocessor
    side: int
    grids: tuple[Size, ...]
    newline: NDArray[np.float32]

    @classmethod
    def open(cls, root: Path, patches: int, options: Mapping[str, Any]) -> Anyres:
        try:
            found = Options.model_validate(dict(options))
        except ValidationError as error:
            raise BundleError(f"the layout_options of the chat settings cannot be read: {error}") from None
        preprocessor = ImagePreprocessor.from_folder(root / "preprocessor", CLASSES)
        if preprocessor.size is None or preprocessor.resample is None:
            raise BundleError(f"{preprocessor.origin} is null, or resample is: the layout anyres resizes every picture")
        tile, side = preprocessor.output_size, math.isqrt(patches)
        if tile.height != tile.width or side**2 != patches:
            raise BundleError(
                f"{preprocessor.origin} says {tile.height}x{tile.width} pixels and the encoder gives {patches} features"
                " of them, the layout anyres has square tiles: take the files of one checkpoint"
            )
        for grid in found.grids:
            if grid[0] % tile.height or grid[1] % tile.width:
                raise BundleError(
                    f"a picture may become {grid[0]}x{grid[1]} pixels, which tiles of {tile.height} pixels "
                    f"({preprocessor.origin}) do not fill: take the files of one checkpoint"
                )
        return cls(preprocessor, side, tuple(Size(*grid) for grid in found.grids), read_tensor(root, NEWLINE))

    @property
    def origin(self) -> str:
        return self.preprocessor.origin

    def check(self, size: Size, field: str) -> None:
        if not any(_seen(size, grid) for grid in self.grids):
            raise InvalidInput(
                field, f"is {size.width}x{size.height}, which no grid of the model can show: send a less elongated one"
            )

    def positions(self, size: Size) -> int:
        lines, columns = (len(range(part.start, part.stop)) for part in self._unpadded(size))
        return self.side**2 + lines * (columns + 1)

    def tiles(self, picture: Picture | PictureFile, field: str) -> NDArray[np.float32]:
        if not isinstance(picture, PictureFile):
            check_picture(picture, field)
        size = Size.of(picture)
        self.check(size, field)
        resized = partial(self.preprocessor.resized, picture)
        grid, edge = self._grid(size), self.preprocessor.output_size.height
        canvas = np.zeros((*grid, 3), np.uint8)
        inner = _inner(size, grid)
        top, left = (grid.height - inner.height) // 2, (grid.width - inner.width) // 2
        canvas[top : top + inner.height, left : left + inner.width] = resized((inner.width, inner.height))
        cut = canvas.reshape(grid.height // edge, edge, grid.width // edge, edge, 3).swapaxes(1, 2)
        return self.preprocessor([resized(self.preprocessor.square), *cut.reshape(-1, edge, edge, 3)], field)

    def pack(self, features: Array, size: Size) -> Array:
        hidden, tiles = features.shape[-1], self._tiles(size)
        grid = features[1:].reshape(tiles.height, tiles.width, self.side, self.side, hidden).swapaxes(1, 2)
        lines = grid.reshape(tiles.height * self.side, tiles.width * self.side, hidden)[self._unpadded(size)]
        ends = np.broadcast_to(self.newline, (len(lines), 1, hidden))
        return np.concatenate([features[0], np.concatenate([lines, ends], axis=1).reshape(-1, hidden)])

    def _grid(self, size: Size) -> Size:
        """The grid that shows most of a picture's pixels, and of those the smallest."""
        return max(self.grids, key=lambda grid: (_seen(size, grid), _seen(size, grid) - grid.height * grid.width))

    def _tiles(self, size: Size) -> Size:
        """How many tiles the grid has along each edge."""
        grid, edge = self._grid(size), self.preprocessor.output_size.height
        return Size(grid.height // edge, grid.width // edge)

    def _unpadded(self, size: Size) -> tuple[slice, slice]:
        """Rows and columns of the map of features that show the picture and not its padding."""
        tiles = self._tiles(size)
        rows, columns = tiles.height * self.side, tiles.width * self.side
        if size.width / size.height > columns / rows:
            margin = (rows - int(round(size.height * (columns / size.width), 7))) // 2
            return slice(margin, rows - margin), slice(0, columns)
        margin = (columns - int(round(size.width * (rows / size.height), 7))) // 2
        return slice(0, rows), slice(margin, columns - margin)


def _seen(size: Size, grid: Size) -> int:
    """How many pixels of a picture a grid can show."""
    scale = min(grid.width / size.width, grid.height / size.height)
    return min(int(size.width * scale) * int(size.height * scale), size.width * size.height)


def _inner(size: Size, grid: Size) -> Size:
    """What a picture is resized to: as large as the grid has room for, its aspect kept."""
    across, down = grid.width / size.width, grid.height / size.height
    if across < down:
        return Size(min(math.ceil(size.height * across), grid.height), grid.width)
    return Size(grid.height, min(math.ceil(size.width * down), grid.width))
