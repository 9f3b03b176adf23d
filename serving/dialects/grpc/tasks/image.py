"""ImageService: converts requests for pictures and their results. Pictures are PNG files."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import asdict, fields
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime import limits
from runtime.bundle.signature import Array
from runtime.diffusion.guides import Control, Style
from runtime.diffusion.hires import Hires
from runtime.errors import InvalidInput
from runtime.pipeline import Event, Progress
from runtime.tasks.image import PROMPTS, SIZES, ImageReady, ImageRequest
from runtime.vision.images import PictureFile, decode_image
from serving.dialects.grpc.messages import done_event, engines, file_of, given, png, queued, queued_event, timings
from serving.dialects.grpc.task import GrpcTask
from serving.enginecast_pb import image_pb2, model_pb2
from serving.host.job import Done, Queued, Started

OPTIONS: Final = (
    *("negative_prompt", "width", "height", "steps", "guidance_scale"),
    *("sampler", "eta", "seed", "images", "preview_every", "strength", "mask_blur", "keep_unmasked"),
    *(
        "guidance_start",
        "guidance_end",
        "forecast",
        "denoising_end",
        "denoising_start",
        "prompt_weights",
        "guess_mode",
        "aesthetic_score",
        "negative_aesthetic_score",
        "mask_fill",
        "variation_seed",
        "variation_strength",
    ),
)
PICTURES: Final = ("image", "mask")
FLOAT: Final = np.dtype("<f4")
PAIRS: Final = (*(f"{of}{name}" for of in ("", "negative_") for name in SIZES), "noise_size")
EDGES: Final = ("left", "top", "right", "bottom")

CONTROL_OPTIONS: Final = ("scale", "start", "end")
HIRES: Final = tuple(one.name for one in fields(Hires))


def image_request(message: image_pb2.GenerateRequest) -> ImageRequest:
    """Convert a request. Unset fields keep the model's defaults; picture files are not decoded yet. Raises
    InvalidInput.
    """
    files: dict[str, Any] = {name: PictureFile.open(data, name) for name, data in given(message, PICTURES).items()}
    if message.HasField("extend"):
        files["extend"] = tuple(getattr(message.extend, side) for side in EDGES)
    files |= {name: (pair.down, pair.across) for name, pair in given(message, PAIRS).items()}
    if message.HasField("hires"):
        files["hires"] = Hires(**given(message.hires, HIRES))
    if message.latents:
        limits.LATENTS.length("latents", message.latents)
        files["latents"] = _stacked([_array(one, f"latents[{i}]") for i, one in enumerate(message.latents)])
    limits.CONTROLS.length("controls", message.controls)
    files["controls"] = tuple(map(_control, message.controls))
    limits.STYLES.length("styles", message.styles)
    files["styles"] = tuple(map(_style, message.styles))
    return ImageRequest(prompt=message.prompt, **given(message, OPTIONS), **files, loras=dict(message.loras))


def _style(message: image_pb2.Style) -> Style:
    return Style(message.name, PictureFile.open(message.image, "styles"), **given(message, ("scale",)))


def _control(message: image_pb2.Control) -> Control:
    return Control(message.name, PictureFile.open(message.image, "controls"), **given(message, CONTROL_OPTIONS))


def _latents(array: Array) -> image_pb2.Latents:
    """The message of latents [channels, height, width]."""
    channels, height, width = array.shape
    return image_pb2.Latents(
        channels=channels, height=height, width=width, values=np.ascontiguousarray(array, FLOAT).tobytes()
    )


def _array(message: image_pb2.Latents, field: str) -> NDArray[np.float32]:
    """Latents [channels, height, width] of a message. Raises InvalidInput naming `field`."""
    shape = message.channels, message.height, message.width
    for length in shape:
        limits.LATENT_EDGE.number(field, length)
    if len(message.values) != FLOAT.itemsize * math.prod(shape):
        raise InvalidInput(
            field, f"has {len(message.values):,} bytes of values, expected {FLOAT.itemsize * math.prod(shape):,} for "
            f"{' x '.join(map(str, shape))} floats"
        )  # fmt: skip
    return np.frombuffer(message.values, FLOAT).reshape(shape).astype(np.float32)


def _stacked(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    if len({array.shape for array in arrays}) > 1:
        raise InvalidInput("latents", "have different shapes, expected the same of each picture")
    return np.stack(arrays)


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
            case ImageReady(picture, index, seed, latents, prompt, negative):
                height, width = picture.shape[:2]
                handed = None if latents is None else _latents(latents)
                image = image_pb2.Image(
                    png=png(picture), width=width, height=height, seed=seed, index=index, latents=handed, prompt=prompt,
                    negative_prompt=negative,
                )  # fmt: skip
                return image_pb2.GenerateResponse(image=image)
            case Done():
                done = image_pb2.ImageDone(timings=timings(event), engines=engines(event), notes=event.notes)
                return image_pb2.GenerateResponse(done=done)
        return None


def image_message(model: str, request: ImageRequest) -> image_pb2.GenerateRequest:
    """Convert a request to its message. Arrays become PNG files."""
    found: dict[str, Any] = {name: getattr(request, name) for name in OPTIONS}
    found |= {name: file_of(picture) for name in PICTURES if (picture := getattr(request, name)) is not None}
    if request.extend is not None:
        found["extend"] = image_pb2.Edges(**dict(zip(EDGES, request.extend, strict=True)))
    pairs = {name: pair for name in PAIRS if (pair := getattr(request, name)) is not None}
    found |= {name: image_pb2.Pixels(down=down, across=across) for name, (down, across) in pairs.items()}
    if request.hires is not None:
        found["hires"] = image_pb2.Hires(**asdict(request.hires))
    if request.latents is not None:
        found["latents"] = map(_latents, request.latents)
    found["controls"] = map(_control_message, request.controls)
    found["styles"] = [image_pb2.Style(name=s.name, image=file_of(s.image), scale=s.scale) for s in request.styles]
    return image_pb2.GenerateRequest(model=model, prompt=request.prompt, **found, loras=request.loras)


def _control_message(control: Control) -> image_pb2.Control:
    options = {name: getattr(control, name) for name in CONTROL_OPTIONS}
    return image_pb2.Control(name=control.name, image=file_of(control.image), **options)


def image_events(responses: Iterator[image_pb2.GenerateResponse]) -> Generator[Event, None, None]:
    """The events of a stream of ImageService.Generate."""
    for response in responses:
        match response.WhichOneof("event"):
            case "queued":
                yield queued_event(response.queued)
            case "progress":
                progress = response.progress
                preview = decode_image(progress.preview_png, "preview") if progress.preview_png else None
                yield Progress(progress.step, progress.total, preview)
            case "image":
                image = response.image
                latents = _array(image.latents, "latents") if image.HasField("latents") else None
                prompts = given(image, PROMPTS)
                yield ImageReady(decode_image(image.png), image.index, image.seed, latents, **prompts)
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
