"""Latents: their initial noise, their scale, the pictures decoded from them and encoded to them."""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Part, run
from runtime.diffusion.schedule import Latents
from runtime.diffusion.tiling import Mosaic, Pixels, places, tile_shape
from runtime.diffusion.variation import Variation, random_stream
from runtime.errors import InvalidInput


class Vae(Frozen):
    """How latents relate to pictures: latents = (vae's latents - shift_factor) * scaling_factor, one per `scale_factor`
    pixels.

    `encoder` says whether the bundle holds the VAE's encoder: those built before pictures could be drawn from pictures
    do not.
    """

    scaling_factor: float = Field(gt=0)
    shift_factor: float = 0.0
    scale_factor: int = Field(ge=1, le=1024)
    latent_channels: int = Field(ge=1, le=1024)
    encoder: bool = False

    def shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of the latents of one picture of that size in pixels."""
        return 1, self.latent_channels, height // self.scale_factor, width // self.scale_factor

    def unscaled(self, latents: Latents) -> Latents:
        """Latents as the VAE has them."""
        return np.asarray(latents / self.scaling_factor + self.shift_factor, np.float32)

    def scaled(self, latents: Latents) -> Latents:
        """The reverse of `unscaled`."""
        return np.asarray((latents - self.shift_factor) * self.scaling_factor, np.float32)


@dataclass(frozen=True)
class Noise:
    """The noise of one picture, float32 [1, channels, height, width]: `start` first, then one of `fresh` for each
    further draw.

    It is drawn when needed, so that a waiting request holds none. `given` replaces the first, a `variation` changes it.
    """

    seed: int
    shape: tuple[int, ...]
    stream: np.random.Generator
    given: Latents | None = None
    variation: Variation | None = None

    def start(self) -> Latents:
        drawn = self.fresh()
        if self.given is not None:
            return self.given
        return drawn if self.variation is None else self.variation.varied(drawn, self.seed)

    def fresh(self) -> Latents:
        return self.stream.standard_normal(self.shape, np.float32)


def noises(
    seed: int | None,
    images: int,
    shape: tuple[int, ...],
    given: Latents | None = None,
    variation: Variation | None = None,
) -> tuple[Noise, ...]:
    """The noise of each of `images` pictures, whose latents have that shape: picture i has the seed `seed` + i, chosen
    at random where there is none. `given` float32 [images, channels, height, width] replaces the initial noise. With
    the strength of a `variation`, pictures have the same seed and differ in its.

    Raises InvalidInput naming `latents`.
    """
    first = secrets.randbits(32) if seed is None else seed
    starts: list[Latents | None] = [None] * images
    if given is not None:
        expected = (images, *shape[1:])
        if given.shape != expected or given.dtype != np.float32 or not np.isfinite(given).all():
            raise InvalidInput("latents", f"are {given.dtype} {given.shape}, expected finite float32 {expected}")
        starts = list(np.split(given, images))
    seeds = [first + (0 if variation is not None and variation.strength else i) for i in range(images)]
    return tuple(
        Noise(own, shape, random_stream(own), start, None if variation is None else variation.of(i))
        for i, (own, start) in enumerate(zip(seeds, starts, strict=True))
    )


class Coder(ABC):
    """One side of an autoencoder: calls the submodel of that name. `most` is how many latents (height times width) it
    may get or give in one call. Larger pictures are taken in tiles, whose edges are multiples of `multiple` pixels.
    """

    verb: ClassVar[str]
    """What it does to pictures, for notes."""

    def __init__(self, submodel: str, vae: Vae, multiple: int) -> None:
        self.most = math.inf
        self._submodel = submodel
        self._vae = vae
        self._multiple = multiple // vae.scale_factor

    @property
    @abstractmethod
    def _values(self) -> int:
        """The values of the submodel's input for each latent."""

    def keep_within(self, room: Mapping[str, float]) -> Sequence[str]:
        """Work in tiles where the submodel has no room for more, as in `ModelPipeline.keep_within`."""
        if self._submodel not in room:
            return ()
        self.most = room[self._submodel] / (np.dtype(np.float32).itemsize * self._values)
        edge = int(self.most**0.5) * self._vae.scale_factor if math.isfinite(self.most) else 0
        return (f"pictures of more than about {edge}x{edge} pixels are {self.verb} in tiles",) if edge else ()


class Decoder(Coder):
    """Makes pictures of latents [1, channels, height, width]: uint8 RGB [height, width, 3]."""

    verb = "decoded"

    @property
    def _values(self) -> int:
        return self._vae.latent_channels

    def __call__(self, latents: Latents) -> Part[NDArray[np.uint8]]:
        return decode(self._vae.unscaled(latents), self._pixels, self._vae.scale_factor, self.most, self._multiple)

    def _pixels(self, latents: Latents) -> Part[Latents]:
        """The pixels [3, height, width] of unscaled latents."""
        outputs = yield from run(self._submodel, latents=latents)
        (image,) = outputs["image"]
        return np.asarray(image)


class Encoder(Coder):
    """Makes latents [1, channels, height, width] of the pixels [3, height, width] of a picture, -1 to 1: the mean of
    the autoencoder's distribution.
    """

    verb = "encoded"

    @property
    def _values(self) -> int:
        return 3 * self._vae.scale_factor**2

    def __call__(self, pixels: Pixels) -> Part[Latents]:
        scale = self._vae.scale_factor
        height, width = (length // scale for length in pixels.shape[1:])
        tile = tile_shape(height, width, self.most, self._multiple)
        mosaic = Mosaic(height, width, 1)
        for rows, columns in places(height, width, tile):
            down, across = (slice(part.start * scale, part.stop * scale) for part in (rows, columns))
            outputs = yield from run(self._submodel, image=np.ascontiguousarray(pixels[None, :, down, across]))
            mosaic.add(rows, columns, outputs["latents"][0])
        return self._vae.scaled(mosaic.picture())[None]

    def lengths(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of a picture of this size in pixels."""
        return self._vae.shape(*size)[2:]

    def reduced(self, mask: NDArray[np.float32]) -> Latents:
        """A mask [height, width] of pixels as one of latents [1, 1, height, width]: each takes its first pixel's."""
        scale = self._vae.scale_factor
        return np.ascontiguousarray(mask[None, None, ::scale, ::scale])


def decode(
    latents: Latents, decoder: Callable[[Latents], Part[Pixels]], scale: int, most: float = math.inf, multiple: int = 1
) -> Part[NDArray[np.uint8]]:
    """The picture of unscaled latents [1, channels, height, width]: uint8 RGB [height, width, 3], in pixels.

    `decoder` gives the pixels [3, height, width], -1 to 1, of such latents; `scale` is how many pixels an edge of a
    latent is. Of more than `most` latents it gets tiles, their edges multiples of `multiple`.
    """
    height, width = latents.shape[2:]
    tile = tile_shape(height, width, most, multiple)
    if tile[0] >= height and tile[1] >= width:
        pixels = yield from decoder(latents)
    else:
        mosaic = Mosaic(height, width, scale)
        for rows, columns in places(height, width, tile):
            mosaic.add(rows, columns, (yield from decoder(np.ascontiguousarray(latents[:, :, rows, columns]))))
        pixels = mosaic.picture()
    picture: NDArray[np.uint8] = np.round((pixels / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
    return picture.transpose(1, 2, 0)
