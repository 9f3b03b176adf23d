"""Comparison of models that embed: the same pictures and texts, then the angles between their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final

import numpy as np

from calibration.observe.metrics import cosine
from calibration.requests.pictures import DRAWN, HELD_OUT, photograph
from export.report.measured import ComparedByName, Floor, Measure, Measured
from export.report.pictures import data_uri
from export.report.pictures import stored as picture_of
from export.report.running import run
from export.task import FOLDER, SEED, Comparison, Effort, Pictures, SpeedEffort
from runtime.bundle.manifest import Bundle, Inside
from runtime.pipeline import Pipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.embed import Embeddings, EmbedRequest
from runtime.vision.images import decoded

TEXTS: Final = (
    "a cat looks into the camera",
    "a rocket stands on the launch pad",
    "a man with a tripod",
    "handwriting on paper",
    "a field of stars",
    "a receipt with prices",
    "rot",
    "a bar chart with labelled axes, drawn in dark green on ivory paper",
)
"""Texts for any model, written for this package."""
TIMED: Final = "a large red circle at the top left on a white background"
EDGE: Final = 128
COSINE: Final = Measure(
    name="embedding_cosine", title="Least cosine of an embedding and its reference", of="least cosine of an embedding"
)


class EmbeddingQuality(Measured):
    """One picture and one text, embedded by both models: the cosine of either embedding with the reference's. Several
    vectors of a picture count as one long vector.
    """

    picture: Inside
    text: str
    image_cosine: float
    text_cosine: float


class EmbedComparison(Comparison):
    """Models that embed."""

    name = "embed"
    stored = "embeddings"
    result = EmbeddingQuality
    noun = "picture with its text"
    measure = COSINE
    floors = (
        Floor(quant="int8", measure=COSINE, least=0.98, reason="That is noise of 14 dB on a vector of length 1."),
        Floor(quant="int4", measure=COSINE, least=0.93, reason="That is noise of 9 dB on a vector of length 1."),
    )

    def wanted(self, effort: Effort) -> int:
        return effort.questions

    def general(self) -> Iterator[EmbedRequest]:
        """Photographs that calibration never uses and drawn pictures in turn, each with a text."""
        for i in count():
            turn = i // 2
            drawn = DRAWN[turn % len(DRAWN)](np.random.default_rng(SEED + i)) if i % 2 else None
            picture = photograph(HELD_OUT[turn % len(HELD_OUT)]) if drawn is None else drawn
            yield EmbedRequest((TEXTS[i % len(TEXTS)],), (picture,))

    def comparing(self, request: EmbedRequest, number: int, effort: Effort) -> EmbedRequest:
        return EmbedRequest(request.texts, request.images)

    def compare(
        self,
        number: int,
        request: EmbedRequest,
        quantized: LoadedModel,
        reference: LoadedModel,
        pictures: Pictures,
        compared: ComparedByName,
    ) -> EmbeddingQuality:
        """Embed one picture and one text with both models."""
        wanted, found = (run(model, request).one(Embeddings) for model in (reference, quantized))
        path = f"{FOLDER}/embedded-{number}.png"
        pictures[path] = decoded(request.images[0])
        return EmbeddingQuality(
            picture=path,
            text=request.texts[0],
            image_cosine=cosine(wanted.images, found.images),
            text_cosine=cosine(wanted.texts, found.texts),
        )

    def figure(self, results: Sequence[EmbeddingQuality]) -> float:
        return min(min(one.image_cosine, one.text_cosine) for one in results)

    def summary(self, results: Sequence[EmbeddingQuality]) -> dict[str, float]:
        """The least of each kind."""
        return {name: min(getattr(one, name) for one in results) for name in ("image_cosine", "text_cosine")}

    def shown(self, bundle: Bundle, results: Sequence[EmbeddingQuality]) -> dict[str, Any]:
        pairs = [(one, data_uri(picture_of(bundle, one.picture))) for one in results]
        return {"embedded": pairs, "least": self.summary(results)}

    def timed(self, model: LoadedModel, effort: SpeedEffort) -> tuple[Pipeline, str]:
        picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
        return model.pipeline(EmbedRequest((TIMED,), (picture,))), "a picture and a text"


TASK: Final = EmbedComparison()
