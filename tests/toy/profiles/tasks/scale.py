"""What is measured of the toy task: the seconds a request takes."""

from __future__ import annotations

from typing import Final

from runtime.tasks.scale import ScaleRequest

from profiles.probes import Probe, seconds
from profiles.task import ProfileTask
from runtime.bundle.manifest import Frozen
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel


def scale_request(model: LoadedModel, settings: Frozen) -> ScaleRequest:
    return ScaleRequest((1.0, 2.0))


def scale_probes(model: LoadedModel, settings: Frozen) -> list[Probe]:
    def run() -> None:
        list(drive(model.pipeline(scale_request(model, settings)), model.engines))

    return [Probe("scaled", "s", lambda: seconds(run))]


TASK: Final = ProfileTask(ScaleRequest.task, "scales", frozenset(), Frozen, scale_request, scale_probes)
