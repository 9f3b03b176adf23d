"""What is measured of models that embed: `embedding`, the seconds that a picture and a text take."""

from __future__ import annotations

from typing import Final

import numpy as np

from profiles.asked import EDGE, PROMPT
from profiles.probes import Probe, seconds
from profiles.task import ProfileTask, Rate, Suite
from profiles.together import drive_together
from runtime.bundle.manifest import Frozen
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel
from runtime.tasks.embed import EmbedRequest


def embed_request(model: LoadedModel, settings: Frozen) -> EmbedRequest:
    picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    return EmbedRequest((PROMPT,), (picture,))


def embed_probes(model: LoadedModel, settings: Frozen) -> list[Probe]:
    def embedding() -> float:
        return seconds(lambda: list(drive(model.pipeline(embed_request(model, settings)), model.engines)))

    return [Probe("embedding", "s", embedding)]


def embedded_together(model: LoadedModel, settings: Frozen, count: int) -> Rate:
    one = embed_request(model, settings)

    def run() -> float:
        pipelines = [model.pipeline(one) for _ in range(count)]
        return count / seconds(lambda: drive_together(pipelines, model.engines))

    return Rate("requests/s", run)


TASK: Final = ProfileTask(
    EmbedRequest.task,
    "embeds",
    frozenset(),
    Frozen,
    embed_request,
    embed_probes,
    batched=embedded_together,
    suites={
        "quick": Suite(repeat=5, budget=3, batches=(1, 2, 4), clients=(), starts=1),
        "full": Suite(repeat=15, budget=60, batches=(1, 2, 4, 8, 16), clients=(), starts=3),
    },
)
