"""Draws the cells of a grid one after another. With a folder, cells are kept there, and drawn only once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.diffusion.infotext import KEY, infotext
from runtime.errors import InvalidInput, NotFound
from runtime.files import key_of, read_regular, written
from runtime.grid.picture import grid_picture
from runtime.grid.plan import GridPlan
from runtime.limits import PICTURE_BYTES
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, decode_image, encode_image
from serving.dialects.grpc.tasks.image import image_message
from serving.dialects.python.results import Drawing

if TYPE_CHECKING:
    from serving.dialects.python.stream import Stream

SEEDS: Final = 2**32

Draw = Callable[[ImageRequest], "Stream[Drawing]"]


@dataclass(frozen=True, eq=False)
class GridDrawing:
    """A finished grid. `image` is the labelled picture of all cells, `cells` are their pictures, uint8 RGB [height,
    width, 3] each, in the order of `plan.cells`: row after row of the first block, then those of the next.
    """

    plan: GridPlan
    image: Picture
    cells: tuple[Picture, ...]

    def save(self, path: str | Path) -> Path:
        """Write the labelled picture as a PNG file with its parameters as Automatic1111's web UI writes them.

        The file has its name only once it is complete. Raises OSError, and ResourceExhausted when the disk is full.
        """
        out, request = Path(path), self.plan.request
        assert request.seed is not None, "a plan has a seed"
        text = infotext(request, request.seed, self.cells[0].shape[:2], self.plan.facts())
        with written(out) as target:
            target.write(encode_image(self.image, texts={KEY: text}))
        return out


class Kept:
    """Pictures of cells in a folder, which is made with the first one. The name of each is a hash of its request and of
    `model`, which tells models from one another.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self._model = folder, model

    def file(self, request: ImageRequest) -> Path:
        """Where the picture of a request is."""
        message = image_message("", request).SerializeToString(deterministic=True)
        return self.folder / f"{key_of(self._model, message.hex(), *_scripts(request))[:32]}.png"

    def get(self, request: ImageRequest) -> Picture | None:
        """The picture that was drawn before. Raises InvalidInput that names a damaged file, and NotFound for one that
        cannot be read.
        """
        file = self.file(request)
        try:
            data = read_regular(file, PICTURE_BYTES.most)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NotFound(
                f"the cell {file} cannot be read: {error.strerror}. Remove it, and it is drawn again"
            ) from None
        try:
            return decode_image(data, str(file))
        except InvalidInput as error:
            raise InvalidInput(str(file), f"{error.reason}. Remove it, and it is drawn again") from None

    def put(self, request: ImageRequest, picture: Picture, seed: int) -> None:
        """Keep a picture. Raises OSError, ResourceExhausted."""
        self.folder.mkdir(exist_ok=True)
        data = encode_image(picture, texts={KEY: infotext(request, seed, picture.shape[:2])})
        with written(self.file(request)) as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())


def resumable(request: ImageRequest) -> ImageRequest:
    """A request without a seed with one that follows from the rest of it: run again, its grid has the same cells."""
    if request.seed is not None:
        return request
    message = image_message("", request).SerializeToString(deterministic=True)
    return replace(request, seed=int(key_of(message.hex(), *_scripts(request)), 16) % SEEDS)


def _scripts(request: ImageRequest) -> list[tuple[str, dict[str, Any]]]:
    """The scripts of a request, whose order counts; its message has them not."""
    return [(name, dict(given)) for name, given in request.scripts.items()]


def cells(plan: GridPlan, draw: Draw, kept: Kept | None = None) -> Iterator[Picture]:
    """The pictures of all cells, in order, each as soon as it is there. Raises the errors of the requests."""
    for request in plan.cells:
        picture = None if kept is None else kept.get(request)
        if picture is None:
            with draw(request) as stream:
                drawn = stream.result().images[0]
            picture = np.asarray(drawn.image, np.uint8)
            if kept is not None:
                kept.put(request, picture, drawn.seed)
        yield picture


def grid(plan: GridPlan, draw: Draw, kept: Kept | None = None) -> GridDrawing:
    """Draw all cells and the labelled picture. Raises the errors of the requests, and InvalidInput naming "grid" for a
    picture that would be too large.
    """
    found = tuple(cells(plan, draw, kept))
    return GridDrawing(plan, grid_picture(plan, found), found)
