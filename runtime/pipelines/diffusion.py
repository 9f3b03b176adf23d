"""Text to picture with a latent diffusion model of Stable Diffusion's kind (Rombach et al. 2022, arXiv 2112.10752).

The submodels that a diffusion bundle has, and what this pipeline calls them with:

    text_encoder   input_ids int64 [batch, sequence] -> last_hidden_state float32 [batch, sequence, hidden]
    unet           sample float32 [batch, channels, height, width], timestep float32 [batch], encoder_hidden_states
                   float32 [batch, sequence, hidden] -> noise_pred float32, shaped as sample
    vae_decoder    latents float32 [batch, channels, height, width], unscaled -> image float32 [batch, 3, height,
                   width], -1 to 1

Those of a model with added conditions (Stable Diffusion XL; Podell et al. 2023, arXiv 2307.01952) differ so far:

    text_encoder   input_ids -> penultimate_hidden_state float32 [batch, sequence, hidden]
    text_encoder_2 input_ids -> penultimate_hidden_state float32 [batch, sequence, hidden_2], text_embeds float32
                   [batch, projection]
    unet           encoder_hidden_states float32 [batch, sequence, hidden + hidden_2], and besides text_embeds, as
                   above, and time_ids float32 [batch, 6]: height and width of the original, top and left of the crop,
                   height and width aimed at, in pixels

The pictures of one request are drawn one after another, each from its own seed, so a picture does not depend on its
neighbours.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.schedule import Latents
from runtime.diffusion.solver import Sampler, Walk, make_sampler
from runtime.diffusion.tiling import Mosaic, places, tile_shape
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import BundleError, EngineError, InvalidInput
from runtime.pipeline import Call, Event, Example, ModelPipeline, Outputs, Pipeline, Progress
from runtime.tasks.image import ImageDefaults, ImageReady, ImageRequest

Rows = dict[str, NDArray[np.float32]]
"""Arrays by the name of the UNet's input, a row for the prompt and, where there is guidance, one for the negative
prompt before it.
"""
T = TypeVar("T")
Step = Generator[Call | Event, Outputs | None, T]
"""A part of the pipeline that results in a T."""


class Vae(Frozen):
    """How latents relate to pictures: latents = (vae's latents - shift_factor) * scaling_factor, one per `scale_factor`
    pixels.
    """

    scaling_factor: float = Field(gt=0)
    shift_factor: float = 0.0
    scale_factor: int = Field(ge=1, le=1024)
    latent_channels: int = Field(ge=1, le=1024)


class Sizes(Frozen):
    """Lengths that a picture's edges may have, in pixels: `min` to `max`, multiples of `multiple`; `default` where none
    is asked for.
    """

    min: int = Field(ge=1, le=limits.EDGE.most)
    max: int = Field(ge=1, le=limits.EDGE.most)
    default: int = Field(ge=1, le=limits.EDGE.most)
    multiple: int = Field(ge=1, le=limits.EDGE.most)

    def check(self, field: str, length: int) -> int:
        """The same length. Raises InvalidInput for `field` when no picture may have it."""
        if not self.min <= length <= self.max or length % self.multiple:
            raise InvalidInput(
                field, f"is {length} pixels, expected {self.min} to {self.max}, a multiple of {self.multiple}"
            )
        return length


class AddedConditions(Frozen):
    """What a UNet is told besides the prompt's hidden states: a pooled prompt and sizes (Podell et al. 2023, section
    2.2).

    With `force_zeros_for_empty_prompt`, of the model's model_index.json, no negative prompt is zeros, not the encoding
    of an empty text.
    """

    force_zeros_for_empty_prompt: bool


class DiffusionConfig(Frozen):
    """The settings of a diffusion bundle: `Manifest.config`, written when the bundle is built.

    `scheduler` is the model's scheduler_config.json, as its pipeline corrects it: diffusers' StableDiffusionPipeline
    sets steps_offset 1 and clip_sample false on whatever file it loads. `added` is None where the UNet has one text
    encoder and no sizes.
    """

    scheduler: SchedulerConfig
    vae: Vae
    sizes: Sizes
    defaults: ImageDefaults = ImageDefaults()
    added: AddedConditions | None = None

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
    def sampler(self) -> str:
        """The sampler used where none is asked for."""
        return self.defaults.sampler or self.scheduler.sampler

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> DiffusionConfig:
        """Read `Manifest.config`. Raises BundleError naming every field that is wrong."""
        try:
            return cls.model_validate(dict(config))
        except (ValidationError, InvalidInput) as error:
            raise BundleError(f"the diffusion settings cannot be read: {error}") from None

    def dump(self) -> dict[str, Any]:
        """What `parse` reads: only the fields that were given, since samplers differ in what they take for an absent
        one.
        """
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


@dataclass(frozen=True)
class _Job:
    """A request that was found valid.

    `ids` int64 [1 or 2, sequence] of each text encoder: the negative prompt first, where it is encoded. `rows` is 2
    where there is guidance: an unencoded negative prompt is zeros. `time_ids` float32 [rows, 6].
    """

    ids: tuple[NDArray[np.int64], ...]
    rows: int
    time_ids: NDArray[np.float32]
    sampler: Sampler
    guidance_scale: float
    noises: tuple[_Noise, ...]
    preview_every: int


@dataclass(frozen=True)
class _Noise:
    """The noise of one picture: `begin`, then what `fresh` draws, both float32 [1, channels, height, width].

    It is drawn when it is needed: of a request that waits nothing is held. `given` takes the place of the first.
    """

    seed: int
    shape: tuple[int, ...]
    rng: np.random.Generator
    given: Latents | None = None

    def begin(self) -> Latents:
        drawn = self.fresh()
        return drawn if self.given is None else self.given

    def fresh(self) -> Latents:
        return self.rng.standard_normal(self.shape, np.float32)


def random_stream(seed: int) -> np.random.Generator:
    """The random numbers of one picture: numpy's Philox with the seed as its key. First the starting latents, then each
    step's noise.
    """
    return np.random.Generator(np.random.Philox(key=seed))


class DiffusionPipeline(ModelPipeline):
    """Draws pictures with the submodels of one model. `tokenizers` are the folders of its text encoders' tokenizers, in
    order.

    `decodes_at_once` is how many latents (height times width) the VAE decoder may get in one call; what is larger is
    decoded in tiles.
    """

    name: ClassVar[str] = "diffusion"
    task: ClassVar[str] = ImageRequest.task
    decodes_at_once: float = math.inf

    def __init__(self, config: DiffusionConfig, *tokenizers: Path) -> None:
        self.config = config
        self.tokenizers = [ClipTokenizer(folder) for folder in tokenizers]
        if len({tokenizer.limit for tokenizer in self.tokenizers}) > 1:
            told = ", ".join(
                f"{folder} {tokenizer.limit}" for folder, tokenizer in zip(tokenizers, self.tokenizers, strict=True)
            )
            raise BundleError(
                f"the tokenizers differ in how many tokens they read ({told}), expected the same: copy both again"
            )

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> DiffusionPipeline:
        """From the folder of the model's files and `Manifest.config`. Raises BundleError when settings or tokenizers do
        not fit.
        """
        parsed = DiffusionConfig.parse(config)
        return cls(
            parsed, *(root / name for name in (("tokenizer", "tokenizer_2") if parsed.added else ("tokenizer",)))
        )

    @property
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the submodels."""
        encoders = "text_encoder and text_encoder_2" if self.config.added else "text_encoder"
        return {
            "input_ids": " or ".join(str(tokenizer.folder) for tokenizer in self.tokenizers),
            "encoder_hidden_states": encoders,
            "text_embeds": "text_encoder_2",
            "sample": "the configuration of vae",
            "latents": "unet",
        }

    def examples(self) -> Iterator[Example]:
        """Requests that try the model's files."""
        yield Example("guidance", ImageRequest("a", negative_prompt="b", steps=2, guidance_scale=2.0, seed=0))
        sizes, last = self.config.sizes, [tokenizer.last for tokenizer in self.tokenizers]
        for text in dict.fromkeys(last):
            yield Example(
                f"the prompt '{text}'",
                ImageRequest(text, steps=2, width=sizes.min, height=sizes.min, guidance_scale=1.0, seed=0),
            )

    def keep_within(self, room: Mapping[str, float]) -> Sequence[str]:
        """Decode in tiles what the VAE decoder has no room for."""
        if "vae_decoder" not in room:
            return ()
        vae = self.config.vae
        self.decodes_at_once = room["vae_decoder"] / (np.dtype(np.float32).itemsize * vae.latent_channels)
        edge = int(self.decodes_at_once**0.5) * vae.scale_factor if math.isfinite(self.decodes_at_once) else 0
        return (f"pictures of more than about {edge}x{edge} pixels are decoded in tiles",) if edge else ()

    def __call__(self, request: ImageRequest) -> Pipeline:
        """The generator that draws: `Progress` after every step (counted over all pictures), `ImageReady` for every
        picture.

        Everything that can be wrong with a request raises here, before any work: InvalidInput naming the field. While
        drawing, EngineError names the submodel that gave something other than finite numbers.
        """
        return self._draw(self._plan(request))

    def _plan(self, request: ImageRequest) -> _Job:
        config, defaults = self.config, self.config.defaults
        width = config.sizes.check("width", config.sizes.default if request.width is None else request.width)
        height = config.sizes.check("height", config.sizes.default if request.height is None else request.height)
        steps = defaults.steps if request.steps is None else request.steps
        if steps * request.images > limits.ALL_STEPS.most:
            raise InvalidInput(
                "images",
                f"of {steps} steps each make {steps * request.images:,} steps, expected at most "
                f"{limits.ALL_STEPS.most:,}",
            )
        guidance_scale = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        prompts = [tokenizer(request.prompt) for tokenizer in self.tokenizers]
        negatives = [tokenizer(request.negative_prompt, "negative_prompt") for tokenizer in self.tokenizers]
        guided = guidance_scale > 1
        zeroed = config.added is not None and config.added.force_zeros_for_empty_prompt and not request.negative_prompt
        encoded = zip(negatives, prompts, strict=True) if guided and not zeroed else zip(prompts, strict=True)
        shape = (1, config.vae.latent_channels, height // config.vae.scale_factor, width // config.vae.scale_factor)
        return _Job(
            ids=tuple(map(np.stack, encoded)),
            rows=1 + guided,
            time_ids=np.tile(self._time_ids(request, (height, width)), (1 + guided, 1)),
            sampler=make_sampler(request.sampler or config.sampler, config.scheduler, steps, request.eta),
            guidance_scale=guidance_scale,
            noises=_noises(request, shape),
            preview_every=request.preview_every,
        )

    def _time_ids(self, request: ImageRequest, size: tuple[int, int]) -> NDArray[np.float32]:
        """The six numbers that a model with added conditions is told of a picture of this size (height, width)."""
        told = request.told_sizes
        if told and self.config.added is None:
            raise InvalidInput(
                next(iter(told)), "cannot be told to this model, which has no such condition: leave it out"
            )
        original, crop, aim = (
            told.get("original_size", size),
            told.get("crop_top_left", (0, 0)),
            told.get("target_size", size),
        )
        return np.array([*original, *crop, *aim], np.float32)

    def _draw(self, job: _Job) -> Pipeline:
        conditions = yield from self._encode(job)
        for index, noise in enumerate(job.noises):
            latents = yield from self._denoise(job, index, noise, conditions)
            image = yield from self._decode(latents)
            yield ImageReady(image, index, noise.seed)

    def _encode(self, job: _Job) -> Step[Rows]:
        """What the UNet is told of the prompts."""
        if self.config.added is None:
            outputs = yield from _run(Call("text_encoder", {"input_ids": job.ids[0]}))
            return {"encoder_hidden_states": outputs["last_hidden_state"]}
        first = yield from _run(Call("text_encoder", {"input_ids": job.ids[0]}))
        second = yield from _run(Call("text_encoder_2", {"input_ids": job.ids[1]}))
        hidden = np.concatenate([outputs["penultimate_hidden_state"] for outputs in (first, second)], axis=-1)
        told = {"encoder_hidden_states": hidden, "text_embeds": second["text_embeds"]}
        if len(hidden) < job.rows:
            told = {name: np.concatenate([np.zeros_like(array), array]) for name, array in told.items()}
        return told | {"time_ids": job.time_ids}

    def _denoise(self, job: _Job, index: int, noise: _Noise, conditions: Rows) -> Step[Latents]:
        """From noise to clean latents [1, channels, height, width]."""
        steps = len(job.sampler.schedule)
        walk = Walk(job.sampler, noise.begin(), noise.fresh)
        while walk.latents is None:
            done = walk.step
            output = yield from _guided(job, walk.x, walk.time, conditions)
            clean = walk.advance(output)
            if walk.step > done:
                shown = job.preview_every and walk.step % job.preview_every == 0
                preview = (yield from self._decode(clean)) if shown else None
                yield Progress(index * steps + walk.step, len(job.noises) * steps, preview)
        return walk.latents

    def _decode(self, latents: Latents) -> Step[NDArray[np.uint8]]:
        """The picture of latents [1, channels, height, width]: uint8 RGB [height, width, 3]."""
        vae = self.config.vae
        unscaled = np.asarray(latents / vae.scaling_factor + vae.shift_factor, np.float32)
        height, width = unscaled.shape[2:]
        tile = tile_shape(height, width, self.decodes_at_once, self.config.sizes.multiple // vae.scale_factor)
        if tile[0] >= height and tile[1] >= width:
            pixels = (yield from _run(Call("vae_decoder", {"latents": unscaled})))["image"][0]
        else:
            mosaic = Mosaic(height, width, vae.scale_factor)
            for rows, columns in places(height, width, tile):
                outputs = yield from _run(
                    Call("vae_decoder", {"latents": np.ascontiguousarray(unscaled[:, :, rows, columns])})
                )
                mosaic.add(rows, columns, outputs["image"][0])
            pixels = mosaic.picture()
        picture: NDArray[np.uint8] = np.round((pixels / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
        return picture.transpose(1, 2, 0)


def _guided(job: _Job, x: Latents, timestep: float, conditions: Rows) -> Step[Latents]:
    """What the UNet predicts for the prompt, pushed away from what it predicts for the negative prompt."""
    inputs = {
        "sample": np.repeat(x, job.rows, axis=0),
        "timestep": np.full(job.rows, timestep, np.float32),
        **conditions,
    }
    output = (yield from _run(Call("unet", inputs)))["noise_pred"]
    if job.rows == 1:
        return output
    negative, positive = output[:1], output[1:]
    return np.asarray(negative + job.guidance_scale * (positive - negative), np.float32)


def _noises(request: ImageRequest, shape: tuple[int, ...]) -> tuple[_Noise, ...]:
    """The noise of every picture, its start drawn or given. Raises InvalidInput naming `latents`."""
    seed = secrets.randbits(32) if request.seed is None else request.seed
    given: list[Latents | None] = [None] * request.images
    if request.latents is not None:
        expected = (request.images, *shape[1:])
        if (
            request.latents.shape != expected
            or request.latents.dtype != np.float32
            or not np.isfinite(request.latents).all()
        ):
            raise InvalidInput(
                "latents", f"are {request.latents.dtype} {request.latents.shape}, expected finite float32 {expected}"
            )
        given = list(np.split(request.latents, request.images))
    return tuple(_Noise(seed + i, shape, random_stream(seed + i), start) for i, start in enumerate(given))


def _run(call: Call) -> Step[Rows]:
    """The outputs of a call, as float32. Raises EngineError if one is not finite: a black picture would hide that."""
    outputs = yield call
    assert outputs is not None, "a driver answers a call with its outputs"
    arrays = {name: np.asarray(array, np.float32) for name, array in outputs.items()}
    for name, array in arrays.items():
        if not math.isfinite(float(array.sum(dtype=np.float64))):
            raise EngineError(
                f"{call.submodel} gave NaN or infinite values in '{name}', expected finite ones: try another target or "
                "--quant none"
            )
    return arrays
