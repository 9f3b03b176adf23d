"""Pictures from a prompt: the request, and the pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from runtime import limits
from runtime.bundle.signature import Array
from runtime.diffusion.guides import Control, Style
from runtime.diffusion.hires import PROMPTS as PROMPTS  # for the modules above this one
from runtime.diffusion.hires import Hires
from runtime.errors import InvalidInput, quoted
from runtime.pipeline import Event
from runtime.task import Request, Task
from runtime.vision.images import Picture, PictureFile, check_picture, file_bytes, lengths

SIZES: Final = ("original_size", "crop_top_left", "target_size")
CONDITIONS: Final = tuple(f"{of}{name}" for of in ("", "negative_") for name in (*SIZES, "aesthetic_score"))
"""The fields with conditions of a model of Stable Diffusion XL's kind."""

ORIGINAL, NOISE, NOTHING = FILLS = ("original", "noise", "nothing")
"""What the drawn part of a masked picture begins with."""

Edges = tuple[int, int, int, int]
"""What is added to a picture on the left, top, right and bottom, in pixels."""


@dataclass(frozen=True, eq=False)
class ImageRequest(Request):
    """Pictures to draw. None is the model's default. Raises InvalidInput naming the field where no model could
    accept it.

    `width` and `height` are in pixels. `negative_prompt` steers away, and counts only with a `guidance_scale` above 1
    (Ho and Salimans 2022, arXiv 2207.12598) of a model that does not receive the scale itself, as one distilled does.
    It counts in the steps from the share `guidance_start` of those that are taken to `guidance_end`, 0 to 1, both
    rounded down to whole steps (Kynkäänniemi et al. 2024, arXiv 2404.07724); in the others the model predicts for the
    prompt alone, which takes half the work. `eta` 0 to 1 is the noise that ddim and tcd add. Picture i of `images` is
    drawn from `seed` + i; without a seed one is chosen, and `ImageReady` says which. `preview_every` n > 0 adds a
    preview to every nth step's `Progress`, at the cost of one run of the VAE decoder each. `latents` float32 [images,
    channels, height, width] replace the standard normal starting noise.

    `forecast` says in which steps the denoiser is called, as "every 3 after 2" or "1-3,6,9,12"; in the others its
    output is continued from the ones before. "none" is every step, and so is None; "stored" are the steps that were
    chosen for the bundle (`runtime.diffusion.forecast`). A second pass has the denoiser in every step.

    `original_size` and `target_size` (height, width) and `crop_top_left` (top, left), in pixels, are conditions of a
    model with added conditions: the size of a picture before it was scaled, where it was cropped, and the size that it
    is to look like. None is the size of the drawn picture, without a crop. `aesthetic_score` is a condition of a model
    that takes one in place of `target_size`, as the refiner: how beautiful the picture is to be, 0 to 10, by default 6.
    Those whose names begin with `negative_` are conditions of the negative prompt, by default those of the prompt; the
    score is 2.5.

    `loras` are LoRA files of the bundle by name, each with its scale: 1 is as it was trained.

    `controls` are for control networks that the bundle was built with, each at most once; their effects add up.
    `styles` are for image adapters that the bundle was built with, likewise. `guess_mode` is of controls: the networks
    count the less, the finer what they add is, a tenth at the first block, and do not count for the negative prompt, so
    that they are followed without a prompt as well (diffusers' option of that name).

    `prompt_weights` reads both prompts as Automatic1111's web UI does: "(word:1.3)" is a weight, and a prompt may be
    longer than the text encoder reads at once (`runtime.diffusion.emphasis`).

    `denoising_end` stops before the end of the schedule, a share of the training's timesteps above 0, below 1; the
    latents are in `ImageReady.latents`. Another model goes on from there: with these `latents` and the same value as
    `denoising_start` (a refiner; Podell et al. 2023, section 2.5).

    `image` is a picture to begin with (image to image): a file, or uint8 RGB [height, width, 3]. It is resized to
    `width` and `height`, by default its own, rounded down to what the model can draw. Of the `steps`, the last are
    taken, as many as the share `strength`, 0 to 1: at 0 the picture comes back as the autoencoder renders it, at 1
    hardly anything of it is left.

    With a `mask`, a picture of the same size, only its white part is drawn anew (inpainting); `extend` adds edges to
    the picture, left, top, right and bottom in pixels, which are drawn as well (outpainting). What is not drawn comes
    back bit for bit as it is in the resized picture, unless `keep_unmasked` is False: then all is as the autoencoder
    renders it. `mask_blur` softens the border between both: the standard deviation of a Gaussian filter of the mask, in
    pixels of the drawn picture. `mask_fill` is what the latents of the white part begin with, besides the noise that
    `strength` adds: one of `FILLS`, by default those of the picture. With a strength of 1 there is noise alone.

    `variation_strength` above 0, up to 1, mixes the noise with that of `variation_seed`, along a sphere: a picture a
    little different. Picture i of `images` then has the seed `seed` and the variation seed `variation_seed` + i. With
    `noise_size` (height, width), in pixels, the noise is that of a picture of this size, in the middle of the drawn
    one, so that a seed draws something similar at another size.

    `hires` draws each picture a second time, at a larger size; it has no place beside `image`.
    """

    task: ClassVar[str] = "image"
    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    forecast: str | None = None
    sampler: str | None = None
    eta: float = 0.0
    seed: int | None = None
    images: int = 1
    preview_every: int = 0
    latents: NDArray[np.float32] | None = None
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_aesthetic_score: float | None = None
    loras: Mapping[str, float] = dataclasses.field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    styles: tuple[Style, ...] = ()
    guess_mode: bool = False
    prompt_weights: bool = False
    image: Picture | PictureFile | None = None
    strength: float | None = None
    mask: Picture | PictureFile | None = None
    mask_blur: float | None = None
    keep_unmasked: bool | None = None
    mask_fill: str | None = None
    extend: Edges | None = None
    denoising_end: float | None = None
    denoising_start: float | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    noise_size: tuple[int, int] | None = None
    hires: Hires | None = None

    def __post_init__(self) -> None:
        for field in PROMPTS:
            limits.PROMPT.length(field, getattr(self, field))
        limits.NAME.length("sampler", self.sampler or "")
        limits.FORECAST.length("forecast", self.forecast or "")
        limits.IMAGES.number("images", self.images)
        limits.PREVIEW_EVERY.number("preview_every", self.preview_every)
        limits.CONTROLS.length("controls", self.controls)
        limits.STYLES.length("styles", self.styles)
        if self.guess_mode and not self.controls:
            raise InvalidInput("guess_mode", "is of controls: give some, or leave it out")
        limits.ETA.number("eta", self.eta)
        for field, limit in (
            ("steps", limits.STEPS),
            ("guidance_scale", limits.GUIDANCE),
            ("guidance_start", limits.GUIDED),
            ("guidance_end", limits.GUIDED),
            ("width", limits.EDGE),
            ("height", limits.EDGE),
            ("strength", limits.STRENGTH),
            ("mask_blur", limits.MASK_BLUR),
            ("denoising_end", limits.DENOISING),
            ("denoising_start", limits.DENOISING),
        ):
            if (value := getattr(self, field)) is not None:
                limit.number(field, value)
        limits.LORAS.length("loras", self.loras)
        for name, scale in self.loras.items():
            limits.NAME.length("loras", name)
            limits.LORA_SCALE.number("loras", scale)
        self._check_seeds()
        for field, pair in self.conditions.items():
            if isinstance(pair, int | float):
                limits.AESTHETIC_SCORE.number(field, pair)
            elif len(pair) != 2 or not all(0 <= length <= limits.EDGE.most for length in pair):
                raise InvalidInput(field, f"is {pair}, expected two lengths in pixels, 0 to {limits.EDGE.most}")
        self._check_pictures()
        self._check_parts()
        self._check_noise()

    def _check_seeds(self) -> None:
        for field in ("seed", "variation_seed"):
            if (seed := getattr(self, field)) is not None and not 0 <= seed <= limits.IMAGE_SEED.most + 1 - self.images:
                raise InvalidInput(field, f"is {seed}, expected 0 to 2^63 - images")

    def _check_noise(self) -> None:
        for field in ("variation_seed", "variation_strength", "noise_size"):
            if self.latents is not None and getattr(self, field) is not None:
                raise InvalidInput(field, "changes the noise that is drawn, which latents replace: give one of both")
        if (self.variation_seed is None) != (self.variation_strength is None):
            raise InvalidInput("variation_seed", "and variation_strength belong together: give both, or none")
        if self.variation_strength is not None:
            limits.VARIATION.number("variation_strength", self.variation_strength)
        if self.noise_size is not None and len(self.noise_size) != 2:
            raise InvalidInput("noise_size", f"has {len(self.noise_size)} lengths, expected height and width")
        for length in self.noise_size or ():
            limits.EDGE.number("noise_size", length)

    def single(self, index: int, first: int | None = None) -> ImageRequest:
        """The request for picture `index` alone. `first` is the seed of the first picture, by default the request's."""
        first = self.seed if first is None else first
        varied = None if self.variation_seed is None else self.variation_seed + index
        return replace(
            self, images=1, seed=first if first is None or self.variation_strength else first + index,
            variation_seed=varied, latents=None if self.latents is None else self.latents[index : index + 1],
        )  # fmt: skip

    def going_on(self, latents: NDArray[np.float32], seed: int, **more: Any) -> ImageRequest:
        """The request to another model that goes on with the latents where this one ended, and `more`; without what is
        of this model: LoRA files, controls, styles, the size aimed at, steps without its denoiser, and the noise, which
        is drawn.
        """
        return replace(
            self, denoising_start=self.denoising_end, denoising_end=None, latents=latents, seed=seed, loras={},
            controls=(), guess_mode=False, styles=(), target_size=None, negative_target_size=None, variation_seed=None,
            variation_strength=None, noise_size=None, forecast=None, **more,
        )  # fmt: skip

    def _check_parts(self) -> None:
        start, end = self.guided
        if start >= end:
            raise InvalidInput("guidance_start", f"is {start:g}, expected less than guidance_end, which is {end:g}")
        if self.mask_fill is not None and self.mask_fill not in FILLS:
            raise InvalidInput("mask_fill", f"is {quoted(self.mask_fill)}, expected one of {', '.join(FILLS)}")
        for field in ("denoising_start", "denoising_end"):
            if getattr(self, field) in (0, 1):
                raise InvalidInput(field, f"is {getattr(self, field):g}, expected a number between 0 and 1")
        if self.denoising_start is not None and self.latents is None:
            raise InvalidInput("denoising_start", "needs latents: those that a request with denoising_end gave")
        if self.partial and self.image is not None:
            raise InvalidInput(
                "image", "and denoising_start or denoising_end exclude each other: use strength with a picture"
            )
        if self.hires is not None and (self.partial or self.image is not None):
            raise InvalidInput("hires", "is of pictures that are drawn whole, and from noise: leave it out")

    @property
    def all_steps(self) -> int | None:
        """The steps of all pictures, a second pass included. None where the model chooses their number."""
        if self.steps is None:
            return None
        return self.images * (self.steps + (0 if self.hires is None else self.hires.steps or self.steps))

    @property
    def guided(self) -> tuple[float, float]:
        """From which share of the steps to which one guidance counts."""
        return self.guidance_start or 0.0, 1.0 if self.guidance_end is None else self.guidance_end

    @property
    def partial(self) -> bool:
        """Whether only a part of the schedule is taken, and another model takes the rest."""
        return self.denoising_start is not None or self.denoising_end is not None

    def _check_pictures(self) -> None:
        for field in ("image", "mask"):
            if isinstance(picture := getattr(self, field), np.ndarray):
                check_picture(picture, field)
        for field in ("strength", "mask", "extend"):
            if self.image is None and getattr(self, field) is not None:
                raise InvalidInput(field, "is of a picture to begin with: give image, or leave it out")
        for field in ("mask_blur", "keep_unmasked", "mask_fill"):
            if not self.masked and getattr(self, field) is not None:
                raise InvalidInput(field, "is of a part of a picture: give mask or extend, or leave it out")
        if self.extend is not None:
            _check_edges(self.extend)
        if self.image is not None and self.mask is not None and lengths(self.mask) != lengths(self.image):
            (height, width), (own_height, own_width) = lengths(self.mask), lengths(self.image)
            raise InvalidInput(
                "mask", f"is {width}x{height} pixels, expected {own_width}x{own_height}, the size of image"
            )
        if self.lengths is not None:
            limits.PICTURE_PIXELS.count("image" if self.extend is None else "extend", math.prod(self.lengths))

    @property
    def masked(self) -> bool:
        """Whether only a part of the picture is drawn anew."""
        return self.mask is not None or self.extend is not None

    @property
    def lengths(self) -> tuple[int, int] | None:
        """Height and width in pixels of the picture that the request begins with, extended, before it is resized."""
        if self.image is None:
            return None
        (height, width), (left, top, right, bottom) = lengths(self.image), self.extend or (0, 0, 0, 0)
        return top + height + bottom, left + width + right

    @property
    def nbytes(self) -> int:
        shown = [*(one.image for one in self.controls), *(one.image for one in self.styles)]
        held = file_bytes([*shown, *(one for one in (self.image, self.mask) if one is not None)])
        return held + (0 if self.latents is None else self.latents.nbytes)

    @property
    def conditions(self) -> dict[str, tuple[int, int] | float]:
        """The sizes and scores that the request states, by field: only a model with added conditions takes them."""
        return {name: value for name in CONDITIONS if (value := getattr(self, name)) is not None}


def _check_edges(edges: Edges) -> None:
    if len(edges) != 4 or not any(edges):
        raise InvalidInput(
            "extend", f"is {edges}, expected pixels to add on the left, top, right and bottom, not all 0"
        )
    for length in edges:
        limits.EXTEND.number("extend", length)


@dataclass(frozen=True)
class ImageReady(Event):
    """A finished picture: uint8 RGB [height, width, 3], number `index` of the request, drawn with `seed`.

    Where the request has `denoising_end`, `latents` float32 [channels, height, width] is what another model begins
    with. `prompt` and `negative_prompt` are what it was drawn from if scripts changed them, else None.
    """

    output: ClassVar[bool] = True
    image: Array
    index: int
    seed: int
    latents: Array | None = None
    prompt: str | None = None
    negative_prompt: str | None = None

    @property
    def nbytes(self) -> int:
        return int(self.image.nbytes) + (0 if self.latents is None else int(self.latents.nbytes))

    @property
    def counts(self) -> Mapping[str, int]:
        return {"pictures": 1}


TASK: Final = Task(ImageRequest, verb="generate")
