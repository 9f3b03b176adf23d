"""Embeddings of texts and pictures, and how well they match: the request, the vectors and the scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language.templates import is_unicode
from runtime.pipeline import Event
from runtime.task import Request, Task
from runtime.vision.images import Picture, PictureFile, check_picture, file_bytes, file_pixels

Match = Literal["itc", "itm"]
"""How a picture and a text are compared. "itc" (image-text contrast) compares their embeddings, "itm" (image-text
matching) lets a network read both together, which takes more time and needs a model with such a network.
"""
MATCHES: Final[tuple[Match, ...]] = ("itc", "itm")


@dataclass(frozen=True, eq=False)
class EmbedRequest(Request):
    """Texts and pictures to embed, or with `match` to compare: every picture with every text.

    Without `match` the result is an `Embeddings` event, else a `Scores` event. Raises InvalidInput naming the field.
    """

    task: ClassVar[str] = "embed"
    texts: tuple[str, ...] = ()
    images: tuple[Picture | PictureFile, ...] = ()
    match: Match | None = None

    def __post_init__(self) -> None:
        limits.TEXTS.length("texts", self.texts)
        limits.TEXT.count("texts", sum(map(len, self.texts)))
        for i, text in enumerate(self.texts):
            if not is_unicode(text):
                raise InvalidInput(f"texts[{i}]", "holds half a surrogate pair, which is no Unicode text")
        limits.PICTURES.length("images", self.images)
        limits.REQUEST_PIXELS.count("images", file_pixels(self.images))
        for i, image in enumerate(self.images):
            if not isinstance(image, PictureFile):
                check_picture(image, f"images[{i}]")
        if not self.texts and not self.images:
            raise InvalidInput("texts", "is empty, and so is images: send one text or picture at least")
        if self.match is not None:
            self._check_match()

    def _check_match(self) -> None:
        if self.match not in MATCHES:
            raise InvalidInput("match", f"is '{self.match}', expected one of {', '.join(MATCHES)}")
        for field, given in (("texts", self.texts), ("images", self.images)):
            if not given:
                raise InvalidInput(field, "is empty: to match, send pictures and texts")
        if self.match == "itm":
            limits.PAIRS.count("match", len(self.texts) * len(self.images))

    @property
    def nbytes(self) -> int:
        return file_bytes(self.images)


@dataclass(frozen=True, eq=False)
class Embeddings(Event):
    """Vectors as the model's own forward gives them, in the order of the request.

    `texts` are float32 [texts, width]; `images` are float32 [images, width], or [images, vectors, width] of a model
    that has several vectors of a picture, such as BLIP-2. `prompt_tokens` counts the tokens of all texts, with what the
    tokenizer puts around each, without padding.
    """

    output: ClassVar[bool] = True
    texts: NDArray[np.float32]
    images: NDArray[np.float32]
    prompt_tokens: int = 0

    @property
    def counts(self) -> Mapping[str, int]:
        return {"embeddings": len(self.texts) + len(self.images)}


@dataclass(frozen=True, eq=False)
class Scores(Event):
    """The score of every picture with every text: float32 [images, texts], larger is closer.

    Of "itc" they are the model's own scores: of CLIP the cosine times its scale, of which a softmax over the texts
    makes probabilities; of SigLIP that plus its bias, of which a sigmoid makes the probability of each pair; of BLIP-2
    the largest cosine of a picture's vectors. Of "itm" they are the probability that both belong together.
    """

    output: ClassVar[bool] = True
    scores: NDArray[np.float32]

    @property
    def counts(self) -> Mapping[str, int]:
        return {"scores": self.scores.size}


TASK: Final = Task(EmbedRequest, verb="embed")
