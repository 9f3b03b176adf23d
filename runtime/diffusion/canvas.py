"""What pictures are drawn on: nothing but noise, another picture (image to image; Meng et al. 2021, arXiv 2108.01073),
or a part of one (inpainting; Lugmayr et al. 2022, arXiv 2201.09865, without its resampling).

Latents of the picture get the noise of a point in the middle of the schedule. A plain denoiser draws all of it, and
what the mask keeps is put back after every step, with the noise that it has there. A denoiser for inpainting gets the
mask and the latents of the masked picture as further channels instead. All equals diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from runtime.diffusion.calls import Part
from runtime.diffusion.latents import Encoder, Noise
from runtime.diffusion.schedule import Latents, Point
from runtime.diffusion.solver import Sampler, Walk
from runtime.diffusion.tiling import Pixels
from runtime.tasks.image import NOISE, ORIGINAL, Edges, ImageRequest
from runtime.vision.images import Picture, PictureFile, decoded, grey, lengths, resized

Shares = NDArray[np.float32]
"""How much of each pixel is drawn anew, [height, width], 0 to 1."""
DRAWN: Final = 0.5
"""Where denoising knows only drawn and kept, a pixel is drawn from this share on."""
WHITE: Final = 255
Fill = Callable[[Latents, Latents], Latents]
"""Changes latents of a picture, given its noise."""


@dataclass(frozen=True)
class Original:
    """The picture that a request begins with, extended by `edges`, then resized to `size` (height, width), in pixels,
    with Lanczos' filter, as diffusers' VaeImageProcessor does.

    With a `mask`, or edges, only a part of it is drawn anew: where the mask is white, and the edges. `blur` is the
    standard deviation of the Gaussian filter of the mask, in pixels of the drawn picture. With `put_back`, the rest is
    copied into the result. `fill` is what the latents of the part that is drawn begin with, one of `FILLS`.
    """

    picture: Picture | PictureFile
    size: tuple[int, int]
    edges: Edges | None = None
    mask: Picture | PictureFile | None = None
    blur: float = 0.0
    put_back: bool = True
    fill: str = ORIGINAL

    @classmethod
    def of(cls, request: ImageRequest, size: tuple[int, int]) -> Original | None:
        """That of a request, None where it begins with noise alone."""
        if request.image is None:
            return None
        put_back = request.keep_unmasked is not False
        blur, fill = request.mask_blur or 0.0, request.mask_fill or ORIGINAL
        return cls(request.image, size, request.extend, request.mask, blur, put_back, fill)

    def pixels(self) -> Picture:
        """Uint8 RGB [height, width, 3]. Edges repeat the pixels that they lie beside. Raises InvalidInput where the
        file is damaged.
        """
        picture = (
            self.picture if self.edges is None else np.pad(decoded(self.picture), around(self.edges, 3), mode="edge")
        )
        return resized(picture, self.size[::-1], Image.Resampling.LANCZOS)

    def shares(self) -> Shares | None:
        """How much of each pixel is drawn anew, None for all of every one. Raises InvalidInput for a damaged mask."""
        if self.mask is None and self.edges is None:
            return None
        mask = np.zeros(lengths(self.picture), np.uint8) if self.mask is None else grey(self.mask)
        if self.edges is not None:
            mask = np.pad(mask, around(self.edges, 2), constant_values=WHITE)
        image = Image.fromarray(mask).resize(self.size[::-1], Image.Resampling.LANCZOS)
        return np.asarray(image.filter(ImageFilter.GaussianBlur(self.blur)), np.float32) / np.float32(WHITE)


def around(edges: Edges, axes: int) -> list[tuple[int, int]]:
    """What numpy's `pad` takes for edges of pixels [height, width, ...] with that many axes."""
    left, top, right, bottom = edges
    return [(top, bottom), (left, right), (0, 0)][:axes]


@dataclass(frozen=True)
class Canvas:
    """`clean` are the latents of the picture that is drawn on, float32 [1, channels, height, width].

    `region` float32 [1, 1, height, width] is 1 where latents are drawn and 0 where those of the picture are kept.
    `channels` are further ones of the denoiser's input. `fill` changes what the latents begin with. `beneath` are the
    pixels that shares of the result are put on.
    """

    clean: Latents | None = None
    region: Latents | None = None
    channels: Latents | None = None
    fill: Fill | None = None
    beneath: tuple[Picture, Shares] | None = None

    def walk(self, sampler: Sampler, noise: Noise) -> Walk:
        """The sampler at work on this canvas. All steps of a masked picture begin with noise alone."""
        start, region, clean = noise.start(), self.region, self.clean
        if self.fill is not None and clean is not None:
            clean = self.fill(clean, start)
        if region is None or clean is None:
            return Walk(sampler, start, noise.fresh, clean)
        return Walk(
            sampler, start, noise.fresh, clean if sampler.schedule.first else None, partial(kept, clean, region, start)
        )

    def input(self, rows: Latents) -> Latents:
        """The denoiser's input for rows of latents."""
        if self.channels is None:
            return rows
        return np.concatenate([rows, np.repeat(self.channels, len(rows), axis=0)], axis=1)

    def finished(self, picture: Picture) -> Picture:
        """A drawn picture, uint8 RGB [height, width, 3], with what is kept of the one beneath bit for bit."""
        if self.beneath is None:
            return picture
        beneath, shares = self.beneath
        drawn = shares[..., None]
        return np.round(beneath * (1 - drawn) + picture * drawn).astype(np.uint8)


def kept(clean: Latents, region: Latents, noise: Latents, x: Latents, point: Point | None) -> Latents:
    """Latents x of a point, or after the last step, with the picture's where they are kept."""
    beneath = clean if point is None else point.noised(clean, noise)
    return np.asarray((1 - region) * beneath + region * x)


def _emptied(region: Latents, share: float, clean: Latents, noise: Latents) -> Latents:
    """Latents with a share of noise, or nothing, in place of the region's."""
    return np.asarray(clean * (1 - region) + np.float32(share) * noise * region)


def prepare(original: Original | None, encoder: Encoder, sampler: Sampler, inpainting: bool) -> Part[Canvas]:
    """The canvas of a request for this sampler. `inpainting` is whether the denoiser is one for inpainting."""
    if original is None:
        return Canvas()
    picture, shares = original.pixels(), original.shares()
    if shares is None:
        return Canvas((yield from encoder(normalized(picture))))
    beneath = (picture, shares) if original.put_back else None
    drawn = (shares >= DRAWN).astype(np.float32)
    region = encoder.reduced(drawn)
    fill = None if original.fill == ORIGINAL else partial(_emptied, region, float(original.fill == NOISE))
    clean = None
    if sampler.schedule.first or not inpainting:
        clean = yield from encoder(normalized(picture))
    if not inpainting:
        return Canvas(clean, region, fill=fill, beneath=beneath)
    masked = yield from encoder(normalized(picture) * (1 - drawn))
    return Canvas(clean, channels=np.concatenate([region, masked], axis=1), fill=fill, beneath=beneath)


def normalized(picture: Picture) -> Pixels:
    """Pixels of uint8 RGB [height, width, 3] as an autoencoder takes them: float32 [3, height, width], -1 to 1."""
    return np.ascontiguousarray((picture.astype(np.float32) / np.float32(127.5) - 1).transpose(2, 0, 1))
