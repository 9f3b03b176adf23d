"""The picture that img2img draws on, as the web UI prepares it (its modules images.py, resize_image, masking.py and
processing.py, StableDiffusionProcessingImg2Img).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from runtime import limits
from runtime.errors import InvalidInput
from runtime.tasks.image import NOISE, NOTHING
from runtime.vision.images import Picture, PictureFile, decoded, grey
from serving.dialects.a1111.fields import ImageToImage

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""
STRETCHED, CROPPED, PADDED = range(3)
"""Values of resize_mode: how a picture gets another shape."""
FILLED, OWN, LATENT_NOISE, LATENT_NOTHING = range(4)
"""Values of inpainting_fill: what the masked part begins with."""
FILLS: Final = {LATENT_NOISE: NOISE, LATENT_NOTHING: NOTHING}
"""Those that are of latents, as fields of requests have them."""
RADII: Final = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""The radii in pixels that colours are spread over into the masked part, and how often each is laid over."""
WHITE: Final = 255
USUAL_BLUR: Final = 4.0

_PREPARING: Final = threading.Lock()
"""Only one masked picture is prepared at a time: each takes several times its pixels in memory."""


@dataclass(frozen=True, eq=False)
class Ground:
    """`fields` are those of the request. `original` is the whole picture, `mask` how much of it is drawn anew, grey
    [height, width], and `box` the part of it that is drawn; None where the model puts the picture together.
    """

    fields: dict[str, Any]
    original: Picture | None = None
    mask: NDArray[np.uint8] | None = None
    box: Box | None = None

    def finished(self, drawn: Picture) -> Picture:
        """A drawn picture inside the one it was drawn on."""
        if self.original is None or self.mask is None:
            return drawn
        beneath, mask, upon = Image.fromarray(self.original), Image.fromarray(self.mask), Image.fromarray(drawn)
        if self.box is None:
            beneath, mask = (one.resize(upon.size, Image.Resampling.LANCZOS) for one in (beneath, mask))
            return np.array(Image.composite(upon, beneath, mask), np.uint8)
        left, top, right, bottom = self.box
        part = upon.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        beneath.paste(part, (left, top), mask.crop(self.box))
        return np.array(beneath, np.uint8)


def ground(message: ImageToImage, file: PictureFile, mask: PictureFile | None, edge: int | None) -> Ground:
    """What a message draws on. `edge` is the usual one of the model's pictures, in pixels. Raises InvalidInput."""
    fields: dict[str, Any] = {"strength": message.denoising_strength}
    if mask is None:
        picture = fitted(file, message.resize_mode, message.width, message.height, "resize_mode")
        return Ground({**fields, "image": picture})
    if mask.size != file.size:
        (width, height), (own_width, own_height) = mask.size, file.size
        raise InvalidInput(
            "mask", f"is {width}x{height} pixels, expected {own_width}x{own_height}, the size of init_images"
        )
    with _PREPARING:
        return _masked(message, fields, file, mask, edge)


def _masked(
    message: ImageToImage, fields: dict[str, Any], file: PictureFile, mask: PictureFile, edge: int | None
) -> Ground:
    fields |= {"mask_fill": FILLS[message.inpainting_fill]} if message.inpainting_fill in FILLS else {}
    picture, shares = decoded(file), _softened(_shares(mask, message), message)
    filled = _filled(picture, shares, message.inpainting_fill)
    if message.inpaint_full_res:
        return _only_masked(message, fields, picture, filled, shares, edge)
    size = message.width, message.height
    picture, filled = (_fitted(one, message.resize_mode, *size, "resize_mode") for one in (picture, filled))
    shares = _fitted(shares, message.resize_mode, *size, "resize_mode")
    fields |= {"image": filled, "mask": _rgb(shares)}
    if message.inpainting_fill != FILLED:
        return Ground(fields)
    return Ground({**fields, "keep_unmasked": False}, picture, shares)


def fitted(file: PictureFile, mode: int, width: int | None, height: int | None, field: str) -> Picture | PictureFile:
    """A picture in the shape of `width` x `height`, which it is resized to later: as it is, cropped, or with its edges
    continued. Raises InvalidInput naming `field` for other modes.
    """
    if mode == STRETCHED or (mode in (CROPPED, PADDED) and _same_shape(file.size, width, height)):
        return file
    return _fitted(decoded(file), mode, width, height, field)


def _same_shape(size: tuple[int, int], width: int | None, height: int | None) -> bool:
    return (width is None and height is None) or (
        width is not None and height is not None and size[0] * height == size[1] * width
    )


def _fitted(
    pixels: NDArray[np.uint8], mode: int, width: int | None, height: int | None, field: str
) -> NDArray[np.uint8]:
    """The same of pixels [height, width, ...]."""
    if mode not in (STRETCHED, CROPPED, PADDED):
        raise InvalidInput(
            field, f"is {mode}, expected 0 (just resize), 1 (crop and resize) or 2 (resize and fill); pictures are "
            "resized before they are encoded, not their latents"
        )  # fmt: skip
    own_height, own_width = pixels.shape[:2]
    if mode == STRETCHED or _same_shape((own_width, own_height), width, height):
        return pixels
    if not width or not height:
        raise InvalidInput(field, f"is {mode}, which needs width and height: send both")
    if mode == CROPPED:
        across, down = (
            min(own_width, round(own_height * width / height)),
            min(own_height, round(own_width * height / width)),
        )
        left, top = (own_width - max(1, across)) // 2, (own_height - max(1, down)) // 2
        return pixels[top : top + max(1, down), left : left + max(1, across)]
    across, down = (
        max(own_width, round(own_height * width / height)),
        max(own_height, round(own_width * height / width)),
    )
    limits.PICTURE_PIXELS.count(field, across * down)
    right, below = across - own_width, down - own_height
    edges = [(below // 2, below - below // 2), (right // 2, right - right // 2), (0, 0)][: pixels.ndim]
    return np.pad(pixels, edges, mode="edge")


def _shares(file: PictureFile, message: ImageToImage) -> NDArray[np.uint8]:
    """The mask, white where the picture is drawn anew. A transparent file says it with its transparency."""
    opacity = file.opacity()
    mask = np.where(opacity > WHITE // 2 + 1, np.uint8(WHITE), np.uint8(0)) if opacity.min() < WHITE else grey(file)
    if message.inpainting_mask_invert not in (0, 1):
        raise InvalidInput(
            "inpainting_mask_invert",
            f"is {message.inpainting_mask_invert}, expected 0 (the white part is drawn) or 1 (the rest is)",
        )
    return WHITE - mask if message.inpainting_mask_invert else mask


def _softened(mask: NDArray[np.uint8], message: ImageToImage) -> NDArray[np.uint8]:
    usual = USUAL_BLUR if message.mask_blur is None else message.mask_blur
    radii = [usual if own is None else own for own in (message.mask_blur_x, message.mask_blur_y)]
    for field, radius in zip(("mask_blur_x", "mask_blur_y"), radii, strict=True):
        limits.MASK_BLUR.number(field if radius != usual else "mask_blur", radius)
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur((radii[0], radii[1]))))


def _filled(picture: Picture, mask: NDArray[np.uint8], fill: int) -> Picture:
    """The picture with the colours around the masked part spread into it, or as it is."""
    if fill not in range(4):
        raise InvalidInput(
            "inpainting_fill", f"is {fill}, expected 0 (fill), 1 (original), 2 (latent noise) or 3 (latent nothing)"
        )
    if fill != FILLED:
        return picture
    image = Image.fromarray(picture)
    known = Image.new("RGBa", image.size)
    known.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(Image.fromarray(mask)))
    result = Image.new("RGBA", image.size)
    for radius, times in RADII:
        spread = known.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(spread)
    return np.array(result.convert("RGB"), np.uint8)


def _only_masked(
    message: ImageToImage,
    fields: dict[str, Any],
    picture: Picture,
    filled: Picture,
    mask: NDArray[np.uint8],
    edge: int | None,
) -> Ground:
    """The masked part is drawn at the full size, and put into the whole picture."""
    limits.EDGE.number("inpaint_full_res_padding", message.inpaint_full_res_padding)
    around = Image.fromarray(mask).getbbox()
    if around is None:
        raise InvalidInput("mask", "leaves nothing to draw: paint white what is to be drawn anew")
    width, height = message.width or edge, message.height or edge
    box = _widened(around, message.inpaint_full_res_padding, picture.shape[:2], (width, height))
    left, top, right, bottom = box
    fields |= {
        "image": np.ascontiguousarray(filled[top:bottom, left:right]),
        "mask": _rgb(mask[top:bottom, left:right]),
        "width": width,
        "height": height,
        "keep_unmasked": False,
    }
    return Ground(fields, picture, mask, box)


def _widened(box: Box, padding: int, lengths: tuple[int, ...], size: tuple[int | None, int | None]) -> Box:
    """A box with padding, then as wide or as high as the shape of `size` (width, height) asks for, inside a picture of
    these `lengths` (height, width).
    """
    bounds = lengths[1], lengths[0]
    ends = [list(_within(box[i] - padding, box[i + 2] + padding, bounds[i])) for i in range(2)]
    across, down = (end - start for start, end in ends)
    width, height = size
    if width and height:
        wanted = max(across, math.ceil(down * width / height)), max(down, math.ceil(across * height / width))
        for i, (length, bound) in enumerate(zip(wanted, bounds, strict=True)):
            start, end = ends[i]
            before = (min(length, bound) - (end - start)) // 2
            start = min(max(0, start - before), bound - min(length, bound))
            ends[i] = [start, start + min(length, bound)]
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def _within(start: int, end: int, bound: int) -> tuple[int, int]:
    return max(0, start), min(bound, end)


def _rgb(grey: NDArray[np.uint8]) -> Picture:
    return np.repeat(grey[..., None], 3, axis=2)
