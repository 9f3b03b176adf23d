"""The pictures of a prompt: their placeholder tokens, what identifies their positions, and their embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.errors import BundleError, InvalidInput
from runtime.kept import Kept
from runtime.language.config import ChatConfig
from runtime.language.decoder import Step, run
from runtime.language.instruction import INPUT, Instructions
from runtime.language.layout import Layout, Size, layout_named
from runtime.language.text import Message
from runtime.pipeline import Call, Outputs, Reused
from runtime.vision.images import Picture, PictureFile

TILES: Final = 16
"""The most tiles of one call of the vision encoder."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: `ids`, with one placeholder per position of a picture, and its pictures in
    order.

    `keys` are the ids with each placeholder replaced by a negative number that tells its picture from others, so that
    equal keys mean equal positions. `instruction` are the tokens that the encoder reads beside the pictures.
    """

    ids: list[int]
    keys: list[int]
    images: list[Picture | PictureFile]
    seen: int = 0
    """Positions of pictures."""
    left_out: int = 0
    """Messages of the conversation that are not in it."""
    instruction: Sequence[int] = ()
    digests: Sequence[bytes] = ()
    """What identifies each picture and what is read beside it."""


class Vision:
    """How one model sees. `layout` turns pictures into tiles and positions; `token` is the id of the placeholder;
    `config.encoders` are the submodels that make features of tiles, in order. `instructions` is None where none of them
    reads the texts of the conversation.
    """

    def __init__(self, layout: Layout, token: int, config: ChatConfig, instructions: Instructions | None) -> None:
        self.layout, self.token, self.config, self.instructions = layout, token, config, instructions
        self.seen = Kept[bytes, Array]()

    @classmethod
    def open(cls, root: Path, config: ChatConfig) -> Vision | None:
        """None for a model that reads text alone. Raises BundleError."""
        if config.image_token_id is None:
            return None
        layout = layout_named(config.layout).open(root, config.tokens_per_image, config.layout_options)
        instructions = Instructions(root, config.instruction) if config.instruction else None
        return cls(layout, config.image_token_id, config, instructions)

    @property
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the encoders."""
        read = {INPUT: str(self.instructions.text.file)} if self.instructions else {}
        return {"pixel_values": self.layout.origin} | read

    def check(self, images: Sequence[Picture | PictureFile]) -> None:
        """Raise InvalidInput for more pictures than a prompt takes, and naming the one whose size the model cannot be
        shown.
        """
        if 0 < self.config.most_pictures < len(images):
            raise InvalidInput(
                "messages",
                f"show {len(images)} pictures, a prompt of this model takes {self.config.most_pictures}: ask about the "
                "others in further requests",
            )
        for image in images:
            self.layout.check(Size.of(image), image.field if isinstance(image, PictureFile) else "messages")

    def prompt(self, ids: Sequence[int], messages: Sequence[Message]) -> Prompt:
        """The prompt of the tokens of messages, with one placeholder per picture. Raises InvalidInput."""
        images = [image for message in messages for image in message.images]
        instruction = self.instructions(messages) if self.instructions and images else []
        digests = [_digest(image, instruction) for image in images]
        pictures = zip(images, digests, strict=True)
        repeated, keys = list[int](), list[int]()
        for id in ids:
            count, key = 1, id
            if id == self.token:
                image, digest = next(pictures)
                count, key = self.layout.positions(Size.of(image)), _name(digest)
            repeated += [id] * count
            keys += [key] * count
        seen = len(repeated) - len(ids) + len(images)
        return Prompt(repeated, keys, images, seen, instruction=instruction, digests=digests)

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
        features = yield from self._features(prompt, first)
        embeds[0, places[passed:] - start] = features[len(features) - (len(places) - passed) :]

    def _features(self, prompt: Prompt, first: int) -> Step[Array]:
        """The embeddings [positions, hidden] of the pictures from number `first` on, one picture behind the other. Each
        picture is encoded once, and not at all if its features are held.
        """
        images, keys = prompt.images[first:], prompt.digests[first:]
        found = {key: features for key in keys if (features := self.seen.get(key)) is not None}
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        if found:
            yield Reused(self.config.encoders[-1], len(found))
        if new:
            encoded = yield from self._see(list(new.values()), prompt.instruction)
            for key, features in zip(new, encoded, strict=True):
                self.seen.put(key, features, features.nbytes)
                found[key] = features
        return np.concatenate([found[key] for key in keys])

    def _see(self, images: Sequence[Picture | PictureFile], instruction: Sequence[int]) -> Step[list[Array]]:
        """The embeddings [positions, hidden] of each picture."""
        tiles = [self.layout.tiles(image, "messages") for image in images]
        pixels, found = np.concatenate(tiles), []
        for start in range(0, len(pixels), TILES):
            piece = pixels[start : start + TILES]
            beside = {INPUT: np.tile(np.array(instruction, np.int64), (len(piece), 1))} if instruction else {}
            found.append((yield from encode(piece, self.config.encoders, beside))["image_features"])
        features = np.concatenate(found)
        if features.shape[1] != self.config.tokens_per_image:
            raise BundleError(
                f"the vision encoder gives {features.shape[1]} patches, the bundle says "
                f"{self.config.tokens_per_image}: build it again"
            )
        pieces = np.split(features, list(accumulate(map(len, tiles)))[:-1])
        return [self.layout.pack(*pair) for pair in zip(pieces, map(Size.of, images), strict=True)]


def encode(pixels: Array, encoders: Sequence[str], beside: Mapping[str, Array] | None = None) -> Step[Outputs]:
    """What submodels make of pixels [tiles, 3, height, width], each from the outputs of the one before: the outputs of
    the last one, which also gets the inputs `beside`.
    """
    outputs: Outputs = {"pixel_values": pixels}
    for encoder in encoders:
        given = beside if encoder == encoders[-1] else None
        outputs = yield from run(Call(encoder, {**outputs, **(given or {})}))
    return outputs


def _name(digest: bytes) -> int:
    """A negative number that identifies a picture and what is read beside it."""
    return -1 - int.from_bytes(digest[:8])


def _digest(picture: Picture | PictureFile, instruction: Sequence[int]) -> bytes:
    """A hash of a picture's size and content, or of its file, and of what is read beside it."""
    content = picture.data if isinstance(picture, PictureFile) else repr(picture.shape).encode() + picture.tobytes()
    return hashlib.sha256(content + repr(instruction).encode() * bool(instruction)).digest()
