"""ImageService: requests for pictures, and the pictures as PNG files."""

from __future__ import annotations

from time import perf_counter
from typing import Final

from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.grpc.messages import engines, given, png, queued, timings
from serving.dialects.grpc.task import GrpcTask
from serving.enginecast_pb import image_pb2, model_pb2
from serving.host.job import Done, Queued, Started

OPTIONS: Final = (
    *("negative_prompt", "width", "height", "steps", "guidance_scale"),
    *("sampler", "eta", "seed", "images", "preview_every"),
)


def image_request(message: image_pb2.GenerateRequest) -> ImageRequest:
    """The request as the diffusion pipeline takes it; what is unset is left to its defaults. Raises InvalidInput."""
    return ImageRequest(prompt=message.prompt, **given(message, OPTIONS))


class ImageStream:
    """Turns the events of one image request into responses, in order."""

    def __init__(self) -> None:
        self._started = perf_counter()

    def response(self, event: Event) -> image_pb2.GenerateResponse | None:
        """The response that tells of this event; None when nothing does."""
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


TASK: Final = GrpcTask(
    ImageRequest.task,
    image_pb2.DESCRIPTOR.services_by_name["ImageService"],
    image_request,
    ImageStream,
    model_pb2.MODEL_KIND_DIFFUSION,
)
