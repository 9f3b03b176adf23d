"""Requests for pictures, as clients of OpenAI send them, to those of `runtime.tasks.image`."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from fastapi import UploadFile
from starlette.datastructures import FormData

from runtime import limits
from runtime.diffusion.defaults import ImageDefaults
from runtime.diffusion.guides import Style
from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, PictureFile
from serving.dialects.openai.fields import Drawing, Edit
from serving.host.models import ModelHost

WORDS: Final = {"images": "n", "width": "size", "height": "size"}
"""The clients' names of fields, by ours."""
AUTO: Final = "auto"
SIZE: Final = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def image_request(body: Drawing, every: int, **pictures: Any) -> ImageRequest:
    """The request in our terms, with a preview of every so many steps, 0 for none. Raises InvalidInput."""
    if body.output_compression is not None:
        limits.QUALITY.number("output_compression", body.output_compression)
        if body.output_format in (None, "png"):
            raise InvalidInput("output_compression", "is of jpeg and webp: send output_format, or leave it out")
    width, height = _size(body.size)
    return ImageRequest(
        body.prompt,
        negative_prompt=body.negative_prompt or "",
        width=width,
        height=height,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        sampler=body.sampler,
        seed=body.seed,
        images=1 if body.n is None else body.n,
        preview_every=every,
        **pictures,
    )


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, AUTO):
        return None, None
    found = SIZE.fullmatch(size or "")
    if found is None:
        raise InvalidInput("size", "is no size, expected auto, or width and height in pixels such as 512x512")
    return int(found[1]), int(found[2])


def preview_every(host: ModelHost, body: Drawing) -> int:
    """After how many steps a preview is due, so that a picture has `partial_images` of them; 0 for none. Raises
    InvalidInput, NotFound.
    """
    if body.partial_images is None:
        return 0
    limits.PARTIAL_IMAGES.number("partial_images", body.partial_images)
    if not body.stream:
        raise InvalidInput("partial_images", "is of streams: send stream true, or leave it out")
    if not body.partial_images:
        return 0
    usual = ImageDefaults.model_validate(host.status(body.model).abilities.get("defaults", {}))
    steps = float(usual.steps if body.steps is None else body.steps)
    if isinstance(body, Edit):
        steps *= usual.strength if body.strength is None else body.strength
    return min(max(1, int(steps) // (body.partial_images + 1)), limits.PREVIEW_EVERY.most)


async def pictures(host: ModelHost, body: Edit) -> dict[str, Any]:
    """What an edit begins with, and what it follows besides. Raises InvalidInput naming the field, NotFound."""
    given = [*([body.image] if body.image is not None else ()), *(body.images or ())]
    if not given:
        raise InvalidInput("image", "is 0 pictures, expected one to draw on")
    styles = await _styles(host, body.model, given[1:])
    image = await _opened(given[0], "image")
    mask = None if body.mask is None else await _opened(body.mask, "mask")
    hole = None if mask is None else await asyncio.to_thread(_holes, mask)
    return {"image": image, "mask": hole, "strength": body.strength, "styles": styles}


async def _styles(host: ModelHost, model: str, files: Sequence[UploadFile]) -> tuple[Style, ...]:
    """Pictures that are followed, one for each image adapter of the model, in the order of its bundle."""
    names = host.status(model).abilities.get("styles", ()) if files else ()
    if len(files) > len(names):
        raise InvalidInput(
            "image",
            f"is {1 + len(files)} pictures: one is drawn on, and {model} has {len(names)} image adapters, which follow "
            f"one more each: send {1 + len(names)} at most",
        )
    return tuple([Style(name, await _opened(file, "image")) for name, file in zip(names, files, strict=False)])


async def _opened(file: UploadFile, field: str) -> PictureFile:
    return await asyncio.to_thread(PictureFile.open, await file.read(), field)


def _holes(mask: PictureFile) -> Picture:
    found = mask.holes()
    if not found.any():
        raise InvalidInput(mask.field, "is nowhere fully transparent, and only such parts are drawn anew")
    return found


def check_once(form: FormData) -> None:
    """Raise InvalidInput for a field that a form has twice: one of both would be dropped."""
    for field, count in Counter(name for name, _ in form.multi_items()).items():
        if count > 1 and not field.endswith("[]"):
            raise InvalidInput(field, f"is {count} times in the form, expected once")
