"""Text to picture with a latent diffusion model of Stable Diffusion's kind (Rombach et al. 2022, arXiv 2112.10752).

The submodels that a diffusion bundle has, and what this pipeline calls them with:

    text_encoder   input_ids int64 [batch, sequence] -> last_hidden_state float32 [batch, sequence, hidden]
    unet           sample float32 [batch, channels, height, width], timestep float32 [batch], encoder_hidden_states float32
                   [batch, sequence, hidden] -> noise_pred float32, shaped as sample
    vae_decoder    latents float32 [batch, channels, height, width], unscaled -> image float32 [batch, 3, height, width], -1 to 1

The pictures of one request are drawn one after another, each from its own seed, so a picture does not depend on its neighbours.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from runtime.bundle import Bundle, Frozen
from runtime.errors import BundleError, EngineError, InvalidInput, SourceError
from runtime.pipeline import Call, Event, ImageReady, Outputs, Pipeline, Progress
from runtime.samplers import Latents, Sampler, SchedulerConfig, State, default_sampler, make_sampler
from runtime.signature import Array
from runtime.tokenizing import ClipTokenizer

DEFAULTS: Final = "enginecast.json"
"""File of a checkpoint's folder that says how the model is best drawn with. The published layouts have no place for that."""
MAX_STEPS: Final = 1000
MAX_GUIDANCE: Final = 50.0
MAX_IMAGES: Final = 64
SEEDS: Final = 2**63
T = TypeVar("T")
Step = Generator[Call | Event, Outputs | None, T]
"""A part of the pipeline that results in a T."""


class Vae(Frozen):
    """How latents relate to pictures: latents = (vae's latents - shift_factor) * scaling_factor, one per `scale_factor` pixels."""

    scaling_factor: float = Field(gt=0)
    shift_factor: float = 0.0
    scale_factor: int = Field(ge=1)
    latent_channels: int = Field(ge=1)


class Sizes(Frozen):
    """Lengths that a picture's edges may have, in pixels: `min` to `max`, multiples of `multiple`; `default` where none is asked for."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)
    default: int = Field(ge=1)
    multiple: int = Field(ge=1)

    def check(self, field: str, length: int) -> int:
        """The same length. Raises InvalidInput for `field` when no picture may have it."""
        if not self.min <= length <= self.max or length % self.multiple:
            raise InvalidInput(field, f"is {length} pixels, expected {self.min} to {self.max}, a multiple of {self.multiple}")
        return length


class Defaults(Frozen):
    """What a request leaves open. `sampler` None is the one the model was published with."""

    steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(default=7.5, ge=0, le=MAX_GUIDANCE)
    sampler: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Defaults:
        """Those that the file `enginecast.json` of a checkpoint's folder gives for this model, where there is one. Raises SourceError."""
        file = folder / DEFAULTS
        if not file.is_file():
            return cls()
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
            raise SourceError(f"{file} gives no defaults that can be used: {reasons}. It may hold {', '.join(cls.model_fields)}") from None


class DiffusionConfig(Frozen):
    """The settings of a diffusion bundle: `Manifest.config`, written when the bundle is built.

    `scheduler` is the model's scheduler_config.json, as its pipeline corrects it: diffusers' StableDiffusionPipeline sets
    steps_offset 1 and clip_sample false on whatever file it loads.
    """

    scheduler: SchedulerConfig
    vae: Vae
    sizes: Sizes
    defaults: Defaults = Defaults()

    @model_validator(mode="after")
    def _fits_together(self) -> DiffusionConfig:
        if self.sizes.multiple % self.vae.scale_factor:
            raise ValueError(f"sizes.multiple {self.sizes.multiple} is no multiple of vae.scale_factor {self.vae.scale_factor}")
        self.sizes.check("sizes.default", self.sizes.default)
        make_sampler(self.sampler, self.scheduler, self.defaults.steps)
        return self

    @property
    def sampler(self) -> str:
        """The sampler used where none is asked for."""
        return self.defaults.sampler or default_sampler(self.scheduler)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> DiffusionConfig:
        """Read `Manifest.config`. Raises BundleError naming every field that is wrong."""
        try:
            return cls.model_validate(dict(config))
        except (ValidationError, InvalidInput) as error:
            raise BundleError(f"the diffusion settings cannot be read: {error}. Build the bundle again") from None

    def dump(self) -> dict[str, Any]:
        """What `parse` reads: only the fields that were given, since samplers differ in what they take for an absent one."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """Pictures to draw. What is None is the model's default. Raises InvalidInput naming the field where no model could accept it.

    `width` and `height` are in pixels. `negative_prompt` steers away, and counts only with a `guidance_scale` above 1 (Ho and Salimans
    2022, arXiv 2207.12598). `eta` 0 to 1 is the noise that the sampler ddim adds. Picture i of `images` is drawn from `seed` + i; without
    a seed one is chosen, and `ImageReady` says which. `preview_every` n > 0 adds a preview to every nth step's `Progress`, at the cost of
    one run of the VAE decoder each. `latents` float32 [images, channels, height, width] replace the standard normal starting noise.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    eta: float = 0.0
    seed: int | None = None
    images: int = 1
    preview_every: int = 0
    latents: Latents | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise InvalidInput("steps", f"is {self.steps}, expected 1 to {MAX_STEPS}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise InvalidInput("guidance_scale", f"is {self.guidance_scale}, expected 0 to {MAX_GUIDANCE:g}")
        if not 1 <= self.images <= MAX_IMAGES:
            raise InvalidInput("images", f"is {self.images}, expected 1 to {MAX_IMAGES}")
        if self.seed is not None and not 0 <= self.seed <= SEEDS - self.images:
            raise InvalidInput("seed", f"is {self.seed}, expected 0 to 2^63 - images")
        if self.preview_every < 0:
            raise InvalidInput("preview_every", f"is {self.preview_every}, expected 0 (no previews) or more")


@dataclass(frozen=True)
class _Job:
    """A request that was found valid. `ids` int64 [1 or 2, sequence]: the negative prompt first, where there is guidance."""

    ids: NDArray[np.int64]
    sampler: Sampler
    guidance_scale: float
    noises: tuple[_Noise, ...]
    preview_every: int


@dataclass(frozen=True)
class _Noise:
    """The noise of one picture: `start`, then what `fresh` draws, both float32 [1, channels, height, width]."""

    seed: int
    start: Latents
    rng: np.random.Generator

    def fresh(self) -> Latents:
        return self.rng.standard_normal(self.start.shape, np.float32)


def random_stream(seed: int) -> np.random.Generator:
    """The random numbers of one picture: numpy's Philox with the seed as its key. First the starting latents, then each step's noise."""
    return np.random.Generator(np.random.Philox(key=seed))


class DiffusionPipeline:
    """Draws pictures with the submodels of one model. `tokenizer` is the model's tokenizer folder."""

    def __init__(self, config: DiffusionConfig, tokenizer: Path) -> None:
        self.config = config
        self.tokenizer = ClipTokenizer(tokenizer)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> DiffusionPipeline:
        """The pipeline of an opened bundle. Raises BundleError when its settings or tokenizer do not fit."""
        return cls(DiffusionConfig.parse(bundle.manifest.config), bundle.root / "tokenizer")

    def __call__(self, request: ImageRequest) -> Pipeline:
        """The generator that draws: `Progress` after every step (counted over all pictures), `ImageReady` for every picture.

        Everything that can be wrong with a request raises here, before any work: InvalidInput naming the field. While drawing,
        EngineError names the submodel that gave something other than finite numbers.
        """
        return self._draw(self._plan(request))

    def _plan(self, request: ImageRequest) -> _Job:
        config, defaults = self.config, self.config.defaults
        width = config.sizes.check("width", config.sizes.default if request.width is None else request.width)
        height = config.sizes.check("height", config.sizes.default if request.height is None else request.height)
        steps = defaults.steps if request.steps is None else request.steps
        guidance_scale = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        prompt = self.tokenizer(request.prompt)
        negative = self.tokenizer(request.negative_prompt, "negative_prompt")
        shape = (1, config.vae.latent_channels, height // config.vae.scale_factor, width // config.vae.scale_factor)
        return _Job(
            ids=np.stack([negative, prompt] if guidance_scale > 1 else [prompt]),
            sampler=make_sampler(request.sampler or config.sampler, config.scheduler, steps, request.eta),
            guidance_scale=guidance_scale,
            noises=_noises(request, shape),
            preview_every=request.preview_every,
        )

    def _draw(self, job: _Job) -> Pipeline:
        hidden = yield from _run(Call("text_encoder", {"input_ids": job.ids}), "last_hidden_state")
        for index, noise in enumerate(job.noises):
            latents = yield from self._denoise(job, index, noise, hidden)
            image = yield from self._decode(latents)
            yield ImageReady(image, index, noise.seed)

    def _denoise(self, job: _Job, index: int, noise: _Noise, hidden: Array) -> Step[Latents]:
        """From noise to clean latents [1, channels, height, width]."""
        sampler, steps = job.sampler, len(job.sampler.timesteps)
        state = State(noise.start * np.float32(sampler.init_noise_sigma))
        for step, timestep in enumerate(sampler.timesteps, start=1):
            output = yield from _guided(job, sampler.model_input(state), timestep, hidden)
            state = sampler.step(state, output, noise.fresh() if sampler.stochastic else None)
            preview = None
            if job.preview_every and step % job.preview_every == 0 and state.denoised is not None:
                preview = yield from self._decode(state.denoised)
            yield Progress(index * steps + step, len(job.noises) * steps, preview)
        return state.latents

    def _decode(self, latents: Latents) -> Step[NDArray[np.uint8]]:
        """The picture of latents [1, channels, height, width]: uint8 RGB [height, width, 3]."""
        vae = self.config.vae
        unscaled = np.asarray(latents / vae.scaling_factor + vae.shift_factor, np.float32)
        image = yield from _run(Call("vae_decoder", {"latents": unscaled}), "image")
        picture: NDArray[np.uint8] = np.round((image[0] / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
        return picture.transpose(1, 2, 0)


def _guided(job: _Job, x: Latents, timestep: np.float32, hidden: Array) -> Step[Latents]:
    """What the UNet predicts for the prompt, pushed away from what it predicts for the negative prompt."""
    batch = len(hidden)
    inputs = {"sample": np.repeat(x, batch, axis=0), "timestep": np.full(batch, timestep, np.float32), "encoder_hidden_states": hidden}
    output = yield from _run(Call("unet", inputs), "noise_pred")
    if batch == 1:
        return output
    negative, positive = output[:1], output[1:]
    return np.asarray(negative + job.guidance_scale * (positive - negative), np.float32)


def _noises(request: ImageRequest, shape: tuple[int, ...]) -> tuple[_Noise, ...]:
    """The noise of every picture, its start drawn or given. Raises InvalidInput naming `latents`."""
    seed = secrets.randbits(32) if request.seed is None else request.seed
    streams = [random_stream(seed + i) for i in range(request.images)]
    starts = [stream.standard_normal(shape, np.float32) for stream in streams]
    if request.latents is not None:
        given = (request.images, *shape[1:])
        if request.latents.shape != given or request.latents.dtype != np.float32 or not np.isfinite(request.latents).all():
            raise InvalidInput("latents", f"are {request.latents.dtype} {request.latents.shape}, expected finite float32 {given}")
        starts = list(np.split(request.latents, request.images))
    return tuple(_Noise(seed + i, start, stream) for i, (start, stream) in enumerate(zip(starts, streams, strict=True)))


def _run(call: Call, output: str) -> Step[NDArray[np.float32]]:
    """One output of a call, as float32. Raises EngineError if it is not finite: a black picture would hide that."""
    outputs = yield call
    assert outputs is not None, "a driver answers a call with its outputs"
    array = np.asarray(outputs[output], np.float32)
    if not math.isfinite(float(array.sum(dtype=np.float64))):
        raise EngineError(
            f"{call.submodel} gave NaN or infinite values in '{output}', expected finite ones: try another target or --quant none"
        )
    return array
