"""What is measured of models that draw: `picture`, the seconds that a whole one takes."""

from __future__ import annotations

from typing import Final

from profiles.probes import Probe, ProbeSettings, seconds
from profiles.task import ProfileTask
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel
from runtime.tasks.image import ImageRequest

PROMPT: Final = "a large red circle at the top left on a white background"


def image_request(settings: ProbeSettings) -> ImageRequest:
    return ImageRequest(PROMPT, width=settings.width, height=settings.height, steps=settings.steps, seed=0)


def image_probes(model: LoadedModel, settings: ProbeSettings) -> list[Probe]:
    asked = {name: value for name in ("width", "height", "steps") if (value := getattr(settings, name)) is not None}
    return [
        Probe(
            "picture",
            "s",
            lambda: seconds(lambda: list(drive(model.pipeline(image_request(settings)), model.engines))),
            asked,
        )
    ]


TASK: Final = ProfileTask(
    ImageRequest.task,
    "draws",
    frozenset({"width", "height", "steps", "guidance-scale", "batch"}),
    image_request,
    image_probes,
)
