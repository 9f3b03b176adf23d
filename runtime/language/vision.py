"""The pictures of a prompt: their placeholder tokens, what identifies their positions, and their embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.errors import BundleError
from runtime.language.config import ChatConfig
from runtime.language.decoder import Step, run
from runtime.language.layout import Layout, Size, layout_named
from runtime.pipeline import Call, Outputs
from runtime.vision.images import Picture, PictureFile

TILES: Final = 16
"""The most tiles of one call of the vision encoder."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: `ids`, with one placeholder per position of a picture, and its pictures in
    order.

    `keys` are the ids with each placeholder replaced by a negative number that tells its picture from others, so that
    equal keys mean equal positions.
    """

    ids: list[int]
    keys: list[int]
    images: list[Picture | PictureFile]
    seen: int = 0
    """Positions of pictures."""
    left_out: int = 0
    """Messages of the conversation that are not in it."""


class Vision:
    """How one model sees. `layout` turns pictures into tiles and positions; `token` is the id of the placeholder;
    `encoders` are the submodels that make features of tiles, in order.
    """

    def __init__(self, layout: Layout, token: int, patches: int, encoders: Sequence[str]) -> None:
        self.layout, self.token, self.patches, self.encoders = layout, token, patches, encoders

    @classmethod
    def open(cls, root: Path, config: ChatConfig) -> Vision | None:
        """None for a model that reads text alone. Raises BundleError."""
        if config.image_token_id is None:
            return None
        layout = layout_named(config.layout).open(root, config.tokens_per_image, config.layout_options)
        return cls(layout, config.image_token_id, config.tokens_per_image, config.encoders)

    def check(self, images: Sequence[Picture | PictureFile]) -> None:
        """Raise InvalidInput naming the picture whose size the model cannot be shown."""
        for image in images:
            self.layout.check(Size.of(image), image.field if isinstance(image, PictureFile) else "messages")

    def prompt(self, ids: Sequence[int], images: Sequence[Picture | PictureFile]) -> Prompt:
        """The prompt of tokens with one placeholder per picture."""
        pictures = iter(images)
        repeated, keys = list[int](), list[int]()
        for id in ids:
            found = next(pictures) if id == self.token else None
            count = 1 if found is None else self.layout.positions(Size.of(found))
            repeated += [id] * count
            keys += [id if found is None else _name(found)] * count
        return Prompt(repeated, keys, list(images), len(repeated) - len(ids) + len(images))

    def insert(self, prompt: Prompt, start: int, embeds: Array) -> Step[None]:
        """Write the pictures' embeddings into those of the prompt from position `start` on, [1, sequence, hidden].

        Encodes only the pictures that have positions there.
        """
        places = np.flatnonzero(np.array(prompt.ids) == self.token)
        ends = list(accumulate(self.layout.positions(Size.of(image)) for image in prompt.images))
        passed = int((places < start).sum())
        first = sum(end <= passed for end in ends)
        if first == len(ends):
            return
        features = yield from self._see(prompt.images[first:])
        embeds[0, places[passed:] - start] = features[len(features) - (len(places) - passed) :]

    def _see(self, images: Sequence[Picture | PictureFile]) -> Step[Array]:
        """The embeddings [positions, hidden] of pictures, one picture behind the other."""
        tiles = [self.layout.tiles(image, "messages") for image in images]
        pixels, found = np.concatenate(tiles), []
        for start in range(0, len(pixels), TILES):
            outputs: Outputs = {"pixel_values": pixels[start : start + TILES]}
            for encoder in self.encoders:
                outputs = yield from run(Call(encoder, outputs))
            found.append(outputs["image_features"])
        features = np.concatenate(found)
        if features.shape[1] != self.patches:
            raise BundleError(
                f"the vision encoder gives {features.shape[1]} patches, the bundle says {self.patches}: build it again"
            )
        pieces = np.split(features, list(accumulate(map(len, tiles)))[:-1])
        return np.concatenate([self.layout.pack(*pair) for pair in zip(pieces, map(Size.of, images), strict=True)])


def _name(picture: Picture | PictureFile) -> int:
    """A negative number made from a picture's size and content, or from its file."""
    content = picture.data if isinstance(picture, PictureFile) else repr(picture.shape).encode() + picture.tobytes()
    digest = hashlib.sha256(content).digest()
    return -1 - int.from_bytes(digest[:8])
