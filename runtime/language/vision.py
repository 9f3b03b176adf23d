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
from runtime.language.decoder import Places, Step, run
from runtime.language.instruction import INPUT, Instructions
from runtime.language.layout import Layout, Size, layout_named
from runtime.language.pruning import diverse
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
    equal keys mean equal positions. `instruction` are the tokens that the encoder reads beside the pictures. Each
    picture has `most` positions at most, 0 is any number: `pruned` are left out of all of them together.
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
    most: int = 0
    pruned: int = 0

    @property
    def length(self) -> int:
        """How far the numbers of its positions go, which are those of the prompt with all positions."""
        return len(self.ids) + self.pruned


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

    def check_pruned(self) -> None:
        """Raise InvalidInput where the positions of a picture are none of its places, so that none can be left out."""
        if len(self.config.encoders) > 1:
            raise InvalidInput(
                "picture_tokens",
                f"is of models that see a picture place by place; this one's {self.config.encoders[-1]} sums every "
                f"picture up in {self.config.tokens_per_image} positions: leave it out",
            )

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

    def prompt(self, ids: Sequence[int], messages: Sequence[Message], most: int = 0) -> Prompt:
        """The prompt of the tokens of messages, with one placeholder per picture, of which each has `most` positions at
        most, 0 is any number. Raises InvalidInput.
        """
        images = [image for message in messages for image in message.images]
        instruction = self.instructions(messages) if self.instructions and images else []
        digests = [_digest(image, instruction) for image in images]
        pictures = zip(images, digests, strict=True)
        repeated, keys, pruned = list[int](), list[int](), 0
        for id in ids:
            count, key = 1, id
            if id == self.token:
                image, digest = next(pictures)
                all_of = self.layout.positions(Size.of(image))
                count = _kept(all_of, most)
                key, pruned = _name(digest, count if count < all_of else 0), pruned + all_of - count
            repeated += [id] * count
            keys += [key] * count
        seen = len(repeated) - len(ids) + len(images)
        return Prompt(repeated, keys, images, seen, 0, instruction, digests, most, pruned)

    def insert(self, prompt: Prompt, start: int, embeds: Array) -> Step[Places]:
        """Write the pictures' embeddings into those of the prompt from position `start` on, [1, sequence, hidden]; the
        numbers of these positions. What is left of a picture has the numbers that it has in the whole picture.

        Encodes only the pictures that have positions there.
        """
        sizes = [self.layout.positions(Size.of(image)) for image in prompt.images]
        ends = list(accumulate(_kept(size, prompt.most) for size in sizes))
        shown = np.split(np.flatnonzero(np.array(prompt.ids) == self.token), ends)[:-1]
        first = sum(int(own[-1]) < start for own in shown)
        places = np.arange(len(prompt.ids), dtype=np.int64)
        places += sum(sizes[:first]) - sum(map(len, shown[:first]))
        features = yield from self._features(prompt, first)
        for own, size, found in zip(shown[first:], sizes[first:], features, strict=True):
            chosen, new = diverse(found, len(own)), own >= start
            embeds[0, own[new] - start] = found[chosen[new]]
            places[own] += chosen - np.arange(len(own))
            places[own[-1] + 1 :] += size - len(own)
        return places[start:]

    def _features(self, prompt: Prompt, first: int) -> Step[list[Array]]:
        """The embeddings [positions, hidden] of the pictures from number `first` on. Each picture is encoded once, and
        not at all if its features are held.
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
        return [found[key] for key in keys]

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


def _kept(positions: int, most: int) -> int:
    """How many positions a picture has of its own, where it has `most` at most."""
    return min(positions, most) if most else positions


def _name(digest: bytes, count: int) -> int:
    """A negative number that identifies a picture, what is read beside it, and how many positions are left of it; 0 is
    all.
    """
    return -1 - int.from_bytes((hashlib.sha256(digest + b"%d" % count).digest() if count else digest)[:8])


def _digest(picture: Picture | PictureFile, instruction: Sequence[int]) -> bytes:
    """A hash of a picture's size and content, or of its file, and of what is read beside it."""
    content = picture.data if isinstance(picture, PictureFile) else repr(picture.shape).encode() + picture.tobytes()
    return hashlib.sha256(content + repr(instruction).encode() * bool(instruction)).digest()
