"""POST /sdapi/v1/extra-single-image and extra-batch-images: pictures at another size, as the web UI resizes them (its
scripts/postprocessing_upscale.py and modules/upscaler.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from fastapi import APIRouter
from PIL import Image

from runtime import limits
from runtime.diffusion.labels import upscaler
from runtime.errors import InvalidInput
from runtime.vision.enlarging import PICTURES
from runtime.vision.images import PictureFile, decoded
from runtime.vision.texts import COMMENT, texts_of
from serving.dialects.a1111.clients import Sender, Settings
from serving.dialects.a1111.fields import ExtraPicture, ExtraPictures, Extras, Options
from serving.dialects.a1111.files import encoded
from serving.dialects.http.pictures import file_of

TO_SIZE: Final = 1
"""The value of resize_mode for a size in pixels."""
MULTIPLE: Final = 8
NONE: Final = "none"


@dataclass(frozen=True)
class Resizing:
    """A picture, the size that it gets before it is cropped, and the parameters that it had."""

    file: PictureFile
    size: tuple[int, int]
    parameters: str


def add(routes: APIRouter, settings: Settings) -> None:
    """Add the endpoints."""
    alone = asyncio.Lock()  # one picture is resized at a time: each takes several times its pixels in memory

    async def changed(message: Extras, texts: Mapping[str, str], field: str, options: Options) -> list[str]:
        """The files in base64 of pictures, by the name of each."""
        pictures = await asyncio.to_thread(_read, message, texts)
        limits.REQUEST_PIXELS.count(field, sum(one.size[0] * one.size[1] for one in pictures))
        found = list[str]()
        for one in pictures:
            async with alone:
                found.append(await asyncio.to_thread(_changed, message, one, options))
        return found

    @routes.post("/sdapi/v1/extra-single-image")
    async def single(message: ExtraPicture, client: Sender) -> dict[str, Any]:
        (text,) = await changed(message, {"image": message.image}, "image", settings.of(client))
        return {"html_info": "", "image": text}

    @routes.post("/sdapi/v1/extra-batch-images")
    async def batch(message: ExtraPictures, client: Sender) -> dict[str, Any]:
        texts = {f"imageList[{number}].data": one.data for number, one in enumerate(message.pictures)}
        return {"html_info": "", "images": await changed(message, texts, "imageList", settings.of(client))}


def _read(message: Extras, texts: Mapping[str, str]) -> list[Resizing]:
    """What is to be done for a message. Raises InvalidInput."""
    found = list[Resizing]()
    for field, text in texts.items():
        file = file_of(text, field)
        size = _size(message, file)
        limits.PICTURE_PIXELS.count(field, size[0] * size[1])
        stored = texts_of(file.data, field)
        found.append(Resizing(file, size, stored.get("parameters") or stored.get(COMMENT, "")))
    return found


def _changed(message: Extras, one: Resizing, options: Options) -> str:
    """The file in base64 of a picture at the size that a message asks for, with the parameters that it had."""
    ways = [_way(message, name) for name in ("upscaler_1", "upscaler_2")]
    picture = Image.fromarray(decoded(one.file))
    if ways[0] is not None:
        found, share = picture.resize(one.size, ways[0]), message.extras_upscaler_2_visibility
        if ways[1] is not None and share:
            found = Image.blend(found, picture.resize(one.size, ways[1]), share)
        picture = _cropped(found, message)
    return encoded(np.array(picture, np.uint8), one.parameters, options)


def _way(message: Extras, field: str) -> Image.Resampling | None:
    """The resampler of a field, None where it has none. Raises InvalidInput."""
    name = getattr(message, field)
    if name.casefold() == NONE:
        return None
    try:
        return PICTURES[upscaler(name)]
    except (InvalidInput, KeyError):
        raise InvalidInput(field, f"'{name:.64}' is not known here, expected None, Lanczos or Nearest") from None


def _size(message: Extras, file: PictureFile) -> tuple[int, int]:
    """The width and height that a picture gets before it is cropped: multiples of 8, as in the web UI."""
    width, height = file.size
    scale = message.upscaling_resize
    if message.resize_mode == TO_SIZE:
        for name in ("upscaling_resize_w", "upscaling_resize_h"):
            if getattr(message, name) < 1:
                raise InvalidInput(name, f"is {getattr(message, name)}, expected a length in pixels")
            limits.EDGE.number(name, getattr(message, name))
        scale = max(message.upscaling_resize_w / width, message.upscaling_resize_h / height)
    wide, high = (max(MULTIPLE, int(length * scale // MULTIPLE * MULTIPLE)) for length in (width, height))
    return wide, high


def _cropped(picture: Image.Image, message: Extras) -> Image.Image:
    """The middle of a picture, where a size in pixels was asked for."""
    if message.resize_mode != TO_SIZE or not message.upscaling_crop:
        return picture
    width, height = message.upscaling_resize_w, message.upscaling_resize_h
    cropped = Image.new("RGB", (width, height))
    cropped.paste(picture, (width // 2 - picture.width // 2, height // 2 - picture.height // 2))
    return cropped
