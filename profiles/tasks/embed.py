"""What is measured of models that embed: `embedding`, the seconds that a picture and a text take."""

from __future__ import annotations

from typing import Final

import numpy as np

from profiles.probes import Probe, seconds
from profiles.task import ProfileTask
from runtime.bundle.manifest import Frozen
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel
from runtime.tasks.embed import EmbedRequest

TEXT: Final = "a large red circle at the top left on a white background"
EDGE: Final = 128
"""Edge in pixels of the measured picture; every model resizes it to its own."""


def embed_request(model: LoadedModel, settings: Frozen) -> EmbedRequest:
    picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    return EmbedRequest((TEXT,), (picture,))


def embed_probes(model: LoadedModel, settings: Frozen) -> list[Probe]:
    def embedding() -> float:
        return seconds(lambda: list(drive(model.pipeline(embed_request(model, settings)), model.engines)))

    return [Probe("embedding", "s", embedding)]


TASK: Final = ProfileTask(EmbedRequest.task, "embeds", frozenset(), Frozen, embed_request, embed_probes)
