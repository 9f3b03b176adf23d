"""ImageService: converts requests for pictures and their results. Pictures are PNG files."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from time import perf_counter
from typing import Final

from runtime import limits
from runtime.pipeline import Event, Progress
from runtime.tasks.image import Control, ImageReady, ImageRequest
from runtime.vision.images import PictureFile, decode_image
from serving.dialects.grpc.messages import done_event, engines, file_of, given, png, queued, timings
from serving.dialects.grpc.task import GrpcTask
from serving.enginecast_pb import image_pb2, model_pb2
from serving.host.job import Done, Queued, Started

OPTIONS: Final = (
    *("negative_prompt", "width", "height", "steps", "guidance_scale"),
    *("sampler", "eta", "seed", "images", "preview_every", "prompt_weights"),
)

CONTROL_OPTIONS: Final = ("scale", "start", "end")


def image_request(message: image_pb2.GenerateRequest) -> ImageRequest:
    """Convert a request. Unset fields keep the model's defaults. Raises InvalidInput."""
    limits.CONTROLS.length("controls", message.controls)
    controls = tuple(map(_control, message.controls))
    return ImageRequest(prompt=message.prompt, **given(message, OPTIONS), controls=controls)


def _control(message: image_pb2.Control) -> Control:
    return Control(message.name, PictureFile.open(message.image, "controls"), **given(message, CONTROL_OPTIONS))


class ImageStream:
    """Converts the events of one image request to responses."""

    def __init__(self) -> None:
        self._started = perf_counter()

    def response(self, event: Event) -> image_pb2.GenerateResponse | None:
        """The response for an event, None if it has none."""
        match event:
            case Queued():
                return image_pb2.GenerateResponse(queued=queued(event))
            case Started():
                self._started = perf_counter()
                return None
            case Progress(step, total, preview):
                eta = (perf_counter() - self._started) / max(step, 1) * (total - step)
                shown = None if preview is None else png(preview)
                progress = image_pb2.ImageProgress(step=step, total=total, eta_seconds=eta, preview_png=shown)
                return image_pb2.GenerateResponse(progress=progress)
            case ImageReady(picture, index, seed):
                height, width = picture.shape[:2]
                image = image_pb2.Image(png=png(picture), width=width, height=height, seed=seed, index=index)
                return image_pb2.GenerateResponse(image=image)
            case Done():
                done = image_pb2.ImageDone(timings=timings(event), engines=engines(event), notes=event.notes)
                return image_pb2.GenerateResponse(done=done)
        return None


def image_message(model: str, request: ImageRequest) -> image_pb2.GenerateRequest:
    """Convert a request to its message."""
    options = {name: getattr(request, name) for name in OPTIONS}
    controls = map(_control_message, request.controls)
    return image_pb2.GenerateRequest(model=model, prompt=request.prompt, **options, controls=controls)


def _control_message(control: Control) -> image_pb2.Control:
    options = {name: getattr(control, name) for name in CONTROL_OPTIONS}
    return image_pb2.Control(name=control.name, image=file_of(control.image), **options)


def image_events(responses: Iterator[image_pb2.GenerateResponse]) -> Generator[Event, None, None]:
    """The events of a stream of ImageService.Generate."""
    for response in responses:
        match response.WhichOneof("event"):
            case "queued":
                yield Queued(response.queued.position)
            case "progress":
                progress = response.progress
                preview = decode_image(progress.preview_png, "preview") if progress.preview_png else None
                yield Progress(progress.step, progress.total, preview)
            case "image":
                image = response.image
                yield ImageReady(decode_image(image.png), image.index, image.seed)
            case "done":
                yield done_event(response.done)


TASK: Final = GrpcTask(
    ImageRequest.task,
    image_pb2.DESCRIPTOR.services_by_name["ImageService"],
    image_request,
    ImageStream,
    image_message,
    image_events,
    model_pb2.MODEL_KIND_DIFFUSION,
)
