"""The settings of a diffusion bundle, which complete a request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import Field, ValidationError, model_validator

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.diffusion.added import AddedConditions, conditions_of
from runtime.diffusion.canvas import Original
from runtime.diffusion.controls import Controls
from runtime.diffusion.defaults import ImageAbilities, ImageDefaults
from runtime.diffusion.forecast import FIELD, NONE, STORED, Plan, Stored
from runtime.diffusion.guidance import Guidance
from runtime.diffusion.latents import Vae
from runtime.diffusion.published import SchedulerConfig, as_drawn_before
from runtime.diffusion.solver import Sampler, make_sampler, samplers
from runtime.diffusion.styles import Styles
from runtime.diffusion.variation import Variation
from runtime.errors import BundleError, InvalidInput
from runtime.tasks.image import ImageRequest


class Sizes(Frozen):
    """Lengths that a picture's edges may have, in pixels: `min` to `max`, multiples of `multiple`; `default` where a
    request names none.
    """

    min: int = Field(ge=1, le=limits.EDGE.most)
    max: int = Field(ge=1, le=limits.EDGE.most)
    default: int = Field(ge=1, le=limits.EDGE.most)
    multiple: int = Field(ge=1, le=limits.EDGE.most)

    def check(self, field: str, length: int) -> int:
        """The same length. Raises InvalidInput naming `field` where pictures cannot have it."""
        if not self.min <= length <= self.max or length % self.multiple:
            raise InvalidInput(
                field, f"is {length} pixels, expected {self.min} to {self.max}, a multiple of {self.multiple}"
            )
        return length

    def of_picture(self, length: int) -> int:
        """The length to draw at on a picture with an edge of this length: rounded down to a multiple. Raises
        InvalidInput naming `image` where pictures cannot have it.
        """
        drawn = length - length % self.multiple
        if not self.min <= drawn <= self.max:
            raise InvalidInput(
                "image", f"has an edge of {length} pixels, expected {self.min} to {self.max}: give width and height, "
                "to which it is resized"
            )  # fmt: skip
        return drawn


class DiffusionConfig(Frozen):
    """The settings of a diffusion bundle: `Manifest.config`, written when the bundle is built.

    `scheduler` is the model's scheduler_config.json, as its pipeline corrects it: diffusers' StableDiffusionPipeline
    sets steps_offset 1 and clip_sample false in every file. `added` is None where the UNet has one text encoder and no
    sizes, `controls` where there are no control networks, `styles` where there are no image adapters. `sampler` draws
    where a request names none. `guidance_embedding` is the width of the embedding in which a distilled model receives
    the guidance scale. `inpainting` is whether the UNet takes the mask and the masked picture's latents as further
    channels. `steps_in_strength` is whether image to image takes all steps in the share of the schedule that the
    strength leaves, as latent consistency models do, not the last of them alone. `forecast` are the steps
    that were chosen to keep the denoiser in, for requests that say so.
    """

    scheduler: SchedulerConfig
    sampler: str
    vae: Vae
    sizes: Sizes
    defaults: ImageDefaults = ImageDefaults()
    added: AddedConditions | None = None
    controls: Controls | None = None
    guidance_embedding: int | None = Field(default=None, ge=4)
    inpainting: bool = False
    steps_in_strength: bool = False
    styles: Styles | None = None
    forecast: Stored | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> DiffusionConfig:
        if self.sizes.multiple % self.vae.scale_factor:
            raise ValueError(
                f"sizes.multiple {self.sizes.multiple} is no multiple of vae.scale_factor {self.vae.scale_factor}"
            )
        self.sizes.check("sizes.default", self.sizes.default)
        self.scheduler.check()
        make_sampler(self.sampler, self.scheduler, self.defaults.steps)
        return self

    @property
    def zeros_for_empty(self) -> bool:
        """Whether an empty negative prompt is zeros, not the encoding of an empty text."""
        return self.added is not None and self.added.force_zeros_for_empty_prompt

    def abilities(self, loras: tuple[str, ...]) -> ImageAbilities:
        """What requests may ask for, with the names of the bundle's LoRA files."""
        return ImageAbilities(
            min_edge=self.sizes.min,
            max_edge=self.sizes.max,
            default_edge=self.sizes.default,
            edge_multiple=self.sizes.multiple,
            defaults=self.defaults.model_copy(update={"sampler": self.sampler}),
            samplers=samplers(),
            image=self.vae.encoder,
            masked=self.inpainting,
            controls=() if self.controls is None else self.controls.names,
            styles=() if self.styles is None else self.styles.names,
            loras=loras,
            conditions=conditions_of(self.added),
        )

    def size_of(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width of the request's pictures, in pixels: by default those of the picture that it begins with.
        Raises InvalidInput naming `width`, `height` or `image`.
        """
        stated = {"height": request.height, "width": request.width}
        own = request.lengths or (None, None)
        height, width = (self._length(*one, length) for one, length in zip(stated.items(), own, strict=True))
        return height, width

    def _length(self, field: str, stated: int | None, own: int | None) -> int:
        if stated is not None:
            return self.sizes.check(field, stated)
        return self.sizes.default if own is None else self.sizes.of_picture(own)

    def original_of(self, request: ImageRequest) -> Original | None:
        """The picture that the request begins with. Raises InvalidInput where this model cannot begin with one, or
        needs one with a mask.
        """
        if self.inpainting and not request.masked:
            raise InvalidInput(
                "mask", "is missing: this model draws the masked part of a picture, so give image and mask, or extend"
            )
        if request.image is None:
            return None
        if not self.vae.encoder:
            raise InvalidInput(
                "image", "needs the encoder of the VAE, which this bundle was built without: build it again with this "
                "version"
            )  # fmt: skip
        return Original.of(request, self.size_of(request))

    def guidance_of(self, request: ImageRequest) -> Guidance:
        """The guidance of the request. Raises InvalidInput naming `guidance_start` or `guidance_end`."""
        width = self.guidance_embedding or 0
        stated = [name for name in ("guidance_start", "guidance_end") if getattr(request, name) is not None]
        if width and stated:
            raise InvalidInput(
                stated[0],
                "is of guidance by a negative prompt, and this model receives the scale instead: leave it out",
            )
        scale = self.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        return Guidance(scale, width, *request.guided)

    def variation_of(self, request: ImageRequest) -> Variation | None:
        """What changes the noise of the request's seed. Raises InvalidInput naming `noise_size`."""
        strength = request.variation_strength or 0.0
        if not strength and request.noise_size is None:
            return None
        shape = None
        if request.noise_size is not None:
            for length in request.noise_size:
                if not self.vae.scale_factor <= length <= self.sizes.max:
                    raise InvalidInput(
                        "noise_size", f"is {request.noise_size}, expected two lengths of {self.vae.scale_factor} to "
                        f"{self.sizes.max} pixels"
                    )  # fmt: skip
            shape = self.vae.shape(*request.noise_size)[2:]
        return Variation(request.variation_seed or 0, strength, shape)

    def steps_of(self, request: ImageRequest) -> int:
        """The steps of a whole schedule."""
        return self.defaults.steps if request.steps is None else request.steps

    def check_steps(self, steps: int, images: int) -> None:
        """Raise InvalidInput naming `images` where they need too many steps together."""
        if steps * images > limits.ALL_STEPS.most:
            raise InvalidInput(
                "images", f"of {steps} steps each make {steps * images:,} steps, expected at most "
                f"{limits.ALL_STEPS.most:,}"
            )  # fmt: skip

    def sampler_of(self, request: ImageRequest) -> Sampler:
        """The sampler of the request, from the middle of its schedule on where the request begins with a picture.
        Raises InvalidInput naming `images`, `sampler`, `steps`, `eta`, `strength`,
        `denoising_start` or `denoising_end`.
        """
        steps = self.steps_of(request)
        self.check_steps(steps, request.images)
        make = partial(make_sampler, request.sampler or self.sampler, self.scheduler, steps, request.eta)
        if request.partial:
            start, end = request.denoising_start or 0.0, request.denoising_end or 1.0
            return make().between(start, end, self.scheduler.trained)
        if request.image is None:
            return make()
        usual = 1.0 if request.masked else self.defaults.strength
        strength = usual if request.strength is None else request.strength
        if strength and self.steps_in_strength and not request.masked:
            return make(strength)
        return make().strengthened(strength)

    def plan_of(self, request: ImageRequest, sampler: Sampler) -> Plan:
        """The steps in which the request does without the denoiser, of those that its sampler takes. Raises
        InvalidInput naming `forecast`.
        """
        text, name = request.forecast or NONE, request.sampler or self.sampler
        if text == STORED:
            if self.forecast is None:
                raise InvalidInput(
                    FIELD, "is stored, and nothing is stored in this bundle: choose it with `enginecast forecast`, or "
                    'name steps, such as "every 3 after 2"'
                )  # fmt: skip
            self.forecast.check(name, len(sampler.schedule.steps))
            text = self.forecast.forecast
        return Plan.read(text, name, sampler)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> DiffusionConfig:
        """Read `Manifest.config`. Raises BundleError naming every field that is wrong."""
        try:
            return cls.model_validate(dict(config) if "sampler" in config else _with_sampler(config))
        except (ValidationError, InvalidInput) as error:
            raise BundleError(f"the diffusion settings cannot be read: {error}") from None

    def dump(self) -> dict[str, Any]:
        """The input of `parse`: only the given fields, since samplers have different defaults for absent ones."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _with_sampler(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a bundle that was built before bundles named their sampler, which draws as it did then. What is
    no mapping stays, for validation to name.
    """
    scheduler, defaults = config.get("scheduler"), config.get("defaults", {})
    if not isinstance(scheduler, Mapping) or not isinstance(defaults, Mapping):
        return config
    kept, sampler = as_drawn_before(scheduler)
    return {**config, "scheduler": kept, "sampler": defaults.get("sampler") or sampler}
