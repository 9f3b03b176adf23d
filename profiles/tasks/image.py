"""What is measured of models that draw: `picture`, the seconds that a whole one takes. Exams score their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from calibration.ground import machine
from calibration.requests.exams import Case
from calibration.requests.tasks.image import TASK as REQUESTS
from calibration.requests.tasks.image import masked
from profiles.asked import PROMPT
from profiles.drawing import Library
from profiles.exam import ExamSettings, Subject, batches
from profiles.probes import Probe, seconds
from profiles.task import ProfileTask, Rate, Requests, Suite, TaskExam
from profiles.together import drive_together
from runtime.bundle.manifest import Bundle, Frozen
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.defaults import ImageDefaults
from runtime.errors import InvalidInput
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel
from runtime.tasks.image import ImageReady, ImageRequest

INDEX: Final = "model_index.json"


class PictureSettings(Frozen):
    """The measured picture: its size in pixels, its denoising steps and those of them that run the UNet. None is the
    model's default, and all steps.
    """

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    forecast: str | None = None


def image_request(bundle: Bundle, settings: PictureSettings) -> ImageRequest:
    """With a picture and a mask where the model is for inpainting."""
    plain = ImageRequest(
        PROMPT, width=settings.width, height=settings.height, steps=settings.steps, forecast=settings.forecast, seed=0
    )
    return masked(DiffusionConfig.parse(bundle.manifest.config), plain)


def image_load(bundle: Bundle, settings: PictureSettings) -> Requests:
    first = image_request(bundle, settings)
    return Requests(
        lambda number: replace(first, prompt=f"{number} {PROMPT}", seed=number),
        lambda event: isinstance(event, ImageReady),
        "pictures/min",
        settings.model_dump(exclude_none=True),
    )


def image_probes(model: LoadedModel, settings: PictureSettings) -> list[Probe]:
    request = image_request(model.bundle, settings)

    def picture() -> float:
        return seconds(lambda: list(drive(model.pipeline(request), model.engines)))

    return [Probe("picture", "s", picture, settings.model_dump(exclude_none=True))]


def pictures_together(model: LoadedModel, settings: PictureSettings, count: int) -> Rate:
    first = image_request(model.bundle, settings)
    requests = [replace(first, prompt=f"{number} {PROMPT}", seed=number) for number in range(count)]

    def run() -> float:
        pipelines = [model.pipeline(request) for request in requests]
        return 60 * count / seconds(lambda: drive_together(pipelines, model.engines))

    return Rate("pictures/min", run, settings.model_dump(exclude_none=True))


class PictureExam(ExamSettings):
    """How the pictures of an exam are drawn."""

    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    forecast: str | None = None

    def request(self, case: Case) -> ImageRequest:
        request: ImageRequest = case.request
        return replace(request, steps=self.steps, guidance_scale=self.guidance_scale, forecast=self.forecast)


def exam_settings(source: Path | None, bundles: Sequence[Path], count: int, options: Mapping[str, Any]) -> PictureExam:
    """The first model's own defaults for what is not given: all models draw alike. Raises InvalidInput naming
    `forecast` for the checkpoint in its own library, which has no such thing.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if source is not None and "forecast" in given:
        raise InvalidInput("forecast", "is of bundles alone: leave --source out")
    defaults = defaults_of(source, bundles)
    return PictureExam(**{"steps": defaults.steps, "guidance_scale": defaults.guidance_scale, "count": count} | given)


def defaults_of(source: Path | None, bundles: Sequence[Path]) -> ImageDefaults:
    """How the first of them draws by its own settings. Raises BundleError or SourceError."""
    if source is not None:
        return ImageDefaults.read(source)
    return DiffusionConfig.parse(Bundle(bundles[0]).manifest.config).defaults


def pictures(model: LoadedModel, cases: Sequence[Case], setting: PictureExam) -> Iterator[Any]:
    for some in batches([setting.request(case) for case in cases], setting.batch):
        for events in drive_together([model.pipeline(request) for request in some], model.engines):
            yield REQUESTS.result(events)


def source_subject(folder: Path, additions: Mapping[str, Mapping[str, Path]]) -> Subject:
    """A pipeline of diffusers, drawing from the noise that ours draws from where the library's pipelines take one."""
    draw = Library(folder, additions)

    def drawn(cases: Sequence[Case], setting: PictureExam) -> Iterator[Any]:
        for some in batches([setting.request(case) for case in cases], setting.batch):
            yield from draw(some)

    program = f"diffusers {machine.version('diffusers')}"
    return Subject(program, folder.name, "none", "torch", "cpu", drawn)


TASK: Final = ProfileTask(
    ImageRequest.task,
    "draws",
    frozenset({"width", "height", "steps", "guidance-scale", "forecast", "batch"}),
    PictureSettings,
    lambda model, settings: image_request(model.bundle, settings),
    image_probes,
    TaskExam(lambda folder: (folder / INDEX).is_file(), source_subject, exam_settings, pictures),
    image_load,
    pictures_together,
    {
        "quick": Suite(repeat=3, budget=3, batches=(1, 2, 4), clients=(1, 4), starts=1),
        "full": Suite(repeat=15, budget=120, batches=(1, 2, 4, 8), clients=(1, 2, 4, 8), starts=3),
    },
    {"steps": 3},
)
