"""The second pass of a request with `hires`: its request and sampler, and the latents that it begins with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from runtime.diffusion.calls import Part
from runtime.diffusion.canvas import normalized
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.hires import Hires, Size
from runtime.diffusion.latents import Decoder, Encoder
from runtime.diffusion.schedule import Latents
from runtime.diffusion.solver import Sampler, make_sampler
from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest
from runtime.vision.enlarging import LATENTS, PICTURES, enlarged
from runtime.vision.images import resized

NEARLY: Final = 1e-9
"""What a quotient of floats may lack of a whole number."""


@dataclass(frozen=True)
class Second:
    """The `request` of the second pass, whose picture has the `size`, and its sampler. Before it is cut to that size,
    what is enlarged covers it.
    """

    request: ImageRequest
    sampler: Sampler
    upscaler: str
    size: Size
    cover: Size

    def enlarged(self, latents: Latents, decoder: Decoder, encoder: Encoder) -> Part[Latents]:
        """The latents that it begins with, from those of the first pass."""
        if self.upscaler in LATENTS:
            cover, size = (encoder.lengths(one) for one in (self.cover, self.size))
            rows, columns = _middle(cover, size)
            return np.ascontiguousarray(enlarged(latents, cover, self.upscaler)[:, :, rows, columns])
        picture = yield from decoder(latents)
        rows, columns = _middle(self.cover, self.size)
        larger = resized(np.ascontiguousarray(picture), self.cover[::-1], PICTURES[self.upscaler])
        return (yield from encoder(normalized(larger[rows, columns])))


def second(config: DiffusionConfig, request: ImageRequest, seed: int) -> Second | None:
    """The second pass of a request whose first picture is drawn with `seed`, None where it has none. Raises
    InvalidInput naming a field of `hires`.
    """
    if request.hires is None:
        return None
    hires, first = request.hires, config.size_of(request)
    with inside():
        size, cover = hires.sizes(first, config.sizes.multiple)
        again = replace(
            request, hires=None, height=size[0], width=size[1], seed=seed, latents=None, forecast=None,
            prompt=request.prompt if hires.prompt is None else hires.prompt,
            negative_prompt=request.negative_prompt if hires.negative_prompt is None else hires.negative_prompt,
        )  # fmt: skip
        config.size_of(again)
        if hires.upscaler in PICTURES and not config.vae.encoder:
            raise InvalidInput(
                "upscaler", f"{hires.upscaler} needs the encoder of the VAE, which this bundle was built without: "
                f"choose one of {', '.join(LATENTS)}, or build it again with this version"
            )  # fmt: skip
        return Second(again, _sampler(config, request, hires), hires.upscaler, size, cover)


def _sampler(config: DiffusionConfig, request: ImageRequest, hires: Hires) -> Sampler:
    """The sampler of the second pass: as many steps as are asked for, the last ones of a longer schedule, as the web UI
    counts them (its sd_samplers_common.py, setup_img2img_steps).
    """
    steps = hires.steps or config.steps_of(request)
    strength = config.defaults.strength if hires.strength is None else hires.strength
    config.check_steps(steps, request.images)
    name = hires.sampler or request.sampler or config.sampler
    if strength and config.steps_in_strength:
        return make_sampler(name, config.scheduler, steps, request.eta, strength)
    whole = max(steps, int(min(steps / strength, sys.maxsize) + NEARLY)) if strength else steps
    if whole > config.scheduler.trained:
        raise InvalidInput(
            "strength", f"is {strength:g}, of which {steps} steps are the last of {whole:,}, expected at most "
            f"{config.scheduler.trained:,}: take fewer steps, or more strength"
        )  # fmt: skip
    return make_sampler(name, config.scheduler, whole, request.eta).last(steps if strength else 0)


def _middle(lengths: Size, wanted: Size) -> tuple[slice, slice]:
    """The middle rows and columns of so many."""
    (above, left) = ((old - new) // 2 for old, new in zip(lengths, wanted, strict=True))
    return slice(above, above + wanted[0]), slice(left, left + wanted[1])


@contextmanager
def inside() -> Iterator[None]:
    """Name the field of `hires` where one of a request is not accepted."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"hires.{error.field}", error.reason) from None
