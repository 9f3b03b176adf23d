"""Embeddings of pictures and texts by two encoders, as CLIP (Radford et al. 2021, arXiv:2103.00020), and their scores.

The submodels that such a bundle has, and what this pipeline calls them with:

    vision_encoder   pixel_values float32 [images, 3, height, width] -> image_features float32 [images, width], or
                     [images, vectors, width] (or the input of a further submodel that gives them, such as a qformer)
    text_encoder     input_ids int64 [batch, sequence] -> text_embeds float32 [batch, width]
    matcher          image_embeds of the vision encoder and input_ids int64 [images, sequence] -> match_logits float32
                     [images, 2], whether they belong together; where the model has one

Texts of the same length run together, so that no row has padding but what the model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import Array
from runtime.bundle.tensors import read_tensor
from runtime.errors import BundleError, EngineError, InvalidInput
from runtime.language.decoder import Step, run
from runtime.language.text import PlainText
from runtime.language.vision import TILES, encode
from runtime.pipeline import Call, Example, ModelPipeline, Outputs, Pipeline
from runtime.tasks.embed import Embeddings, EmbedRequest, Scores
from runtime.vision.images import lengths
from runtime.vision.preprocessing import ImagePreprocessor

SCALE: Final = "logit_scale"
"""The tensor whose exponential cosines are multiplied by."""
BIAS: Final = "logit_bias"
"""The tensor that is then added."""


class EmbedConfig(Frozen):
    """The settings of such a bundle. `width` is that of the embeddings, `text_length` the most tokens of a text.

    `encoders` turn pixels into features, each taking the outputs of the one before. `padding` is the token that fills
    texts up to `text_length`, of models that read all of it. `scaled` and `biased` say that scores are cosines times a
    factor of the checkpoint, and plus a number of it; `matcher` that there is a network that reads both.
    """

    width: int = Field(ge=1)
    text_length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    encoders: tuple[str, ...] = ("vision_encoder",)
    padding: int | None = Field(default=None, ge=0)
    scaled: bool = False
    biased: bool = False
    matcher: bool = False


class EmbedPipeline(ModelPipeline):
    """Embeds and compares with the submodels of one bundle. Raises BundleError when settings or files do not fit."""

    name: ClassVar[str] = "embed"
    task: ClassVar[str] = EmbedRequest.task

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Self:
        return cls(root, config)

    def __init__(self, root: Path, config: Mapping[str, Any]) -> None:
        try:
            self.config = EmbedConfig.model_validate(config)
        except ValidationError as error:
            raise BundleError(f"the embedding settings cannot be read: {error}") from None
        self.text, self.preprocessor = (
            PlainText(root / "tokenizer"),
            ImagePreprocessor.from_folder(root / "preprocessor"),
        )
        self.text.require_below(self.config.vocab_size)
        self.scale = np.exp(read_tensor(root, SCALE).reshape(())) if self.config.scaled else np.float32(1)
        self.bias = read_tensor(root, BIAS).reshape(()) if self.config.biased else np.float32(0)

    @property
    def origins(self) -> Mapping[str, str]:
        return {
            "pixel_values": self.preprocessor.origin,
            "input_ids": str(self.text.file),
            "image_embeds": "vision_encoder",
        }

    def examples(self) -> Iterator[Example]:
        picture = np.zeros((24, 36, 3), np.uint8)
        yield Example("texts and pictures", EmbedRequest(("x", "x y"), (picture,)))
        if self.config.matcher:
            yield Example("pairs", EmbedRequest(("x",), (picture,), "itm"))

    def __call__(self, request: EmbedRequest) -> Pipeline:
        """The generator that embeds or compares: one `Embeddings` or `Scores` event. Raises InvalidInput naming the
        text or picture at fault, before any call.
        """
        if request.match == "itm" and not self.config.matcher:
            raise InvalidInput("match", "is 'itm', which needs a network that this model does not have: send 'itc'")
        for i, image in enumerate(request.images):
            self.preprocessor.check(lengths(image)[::-1], f"images[{i}]")
        return self._run(request, [self._tokens(text, f"texts[{i}]") for i, text in enumerate(request.texts)])

    def _tokens(self, text: str, field: str) -> list[int]:
        ids, most = self.text.tokens(text, field), self.config.text_length
        if len(ids) > most:
            raise InvalidInput(field, f"has {len(ids)} tokens, the model reads {most}: shorten it")
        return ids

    def _padded(self, ids: list[int]) -> list[int]:
        """The tokens of a text as the text encoder takes them."""
        if self.config.padding is None:
            return ids
        return ids + [self.config.padding] * (self.config.text_length - len(ids))

    def _run(self, request: EmbedRequest, tokens: Sequence[list[int]]) -> Pipeline:
        texts = [self._padded(ids) for ids in tokens]
        if request.match == "itm":
            yield Scores(_finite((yield from self._matched(request, texts))))
            return
        seen, read = _finite((yield from self._see(request))), _finite((yield from self._read(texts)))
        if request.match is None:
            yield Embeddings(read, seen, sum(map(len, tokens)))
            return
        cosines = seen.reshape(len(seen), -1, self.config.width) @ read.T
        yield Scores(np.asarray(cosines.max(axis=1) * self.scale + self.bias, np.float32))

    def _see(self, request: EmbedRequest) -> Step[NDArray[np.float32]]:
        """The embeddings of the pictures."""
        found = [np.zeros((0, self.config.width), np.float32)]
        for pixels in self._pixels(request):
            outputs = yield from encode(pixels, self.config.encoders)
            found.append(np.asarray(outputs["image_features"], np.float32))
        return np.concatenate(found[1:] or found)

    def _pixels(self, request: EmbedRequest) -> Iterator[Array]:
        """What the vision encoder gets, in calls of at most TILES pictures."""
        for start in range(0, len(request.images), TILES):
            yield self.preprocessor(request.images[start : start + TILES], "images")

    def _read(self, texts: Sequence[list[int]]) -> Step[NDArray[np.float32]]:
        """The embeddings [texts, width] of texts."""
        found = np.zeros((len(texts), self.config.width), np.float32)
        for rows, ids in _batches(texts):
            outputs = yield from run(Call("text_encoder", {"input_ids": ids}))
            found[rows] = outputs["text_embeds"]
        return found

    def _matched(self, request: EmbedRequest, texts: Sequence[list[int]]) -> Step[NDArray[np.float32]]:
        """The probabilities [images, texts] that both belong together."""
        found = np.zeros((len(request.images), len(texts)), np.float32)
        start = 0
        for pixels in self._pixels(request):
            outputs = yield from encode(pixels, self.config.encoders[:1])
            for place, patches in enumerate(outputs["image_embeds"], start):
                for rows, ids in _batches(texts):
                    found[place, rows] = yield from _together(patches, ids)
            start += len(pixels)
        return found


def _finite(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same numbers. Raises EngineError where one is none."""
    if not np.isfinite(numbers).all():
        raise EngineError(
            "an encoder gave embeddings or scores that are not numbers: verify the bundle, or build it with a higher "
            "precision"
        )
    return numbers


def _together(patches: Array, ids: Array) -> Step[NDArray[np.float32]]:
    """The probabilities that one picture belongs to texts of one length."""
    inputs: Outputs = {"image_embeds": np.repeat(patches[None], len(ids), axis=0), "input_ids": ids}
    outputs = yield from run(Call("matcher", inputs))
    logits = np.asarray(outputs["match_logits"], np.float32)
    return np.asarray(1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), np.float32)


def _batches(texts: Sequence[list[int]]) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """Texts of the same length, at most TILES together: their places and tokens."""
    for length in sorted({len(text) for text in texts}):
        rows = [row for row, text in enumerate(texts) if len(text) == length]
        for start in range(0, len(rows), TILES):
            some = rows[start : start + TILES]
            yield some, np.array([texts[row] for row in some], np.int64)
