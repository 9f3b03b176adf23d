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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.diffusion.calls import Arrays, Part, run
from runtime.diffusion.conditioning import Conditioning, Prompts, TextEncoder
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.guidance import Guidance
from runtime.diffusion.latents import Noise, decode, noises
from runtime.diffusion.schedule import Latents
from runtime.diffusion.solver import Sampler, Walk
from runtime.errors import InvalidInput
from runtime.pipeline import Example, ModelPipeline, Pipeline, Progress
from runtime.tasks.image import ImageReady, ImageRequest

ENCODER: Final = (TextEncoder("text_encoder", "tokenizer", "last_hidden_state"),)
TWO_ENCODERS: Final = (
    TextEncoder("text_encoder", "tokenizer", "penultimate_hidden_state"),
    TextEncoder("text_encoder_2", "tokenizer_2", "penultimate_hidden_state", pooled="text_embeds"),
)
"""Those of a model with added conditions."""


@dataclass(frozen=True)
class _Job:
    """A request that was found valid. `added` holds the added conditions that are not text."""

    prompts: Prompts
    added: Arrays
    guidance: Guidance
    sampler: Sampler
    noises: tuple[Noise, ...]
    preview_every: int


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
        zeros = config.added is not None and config.added.force_zeros_for_empty_prompt
        self.conditioning = Conditioning(_encoders(config), tokenizers, zeros)

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> DiffusionPipeline:
        """From the folder of the model's files and `Manifest.config`. Raises BundleError when settings or tokenizers do
        not fit.
        """
        parsed = DiffusionConfig.parse(config)
        return cls(parsed, *(root / encoder.tokenizer for encoder in _encoders(parsed)))

    @property
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the submodels."""
        encoders = " and ".join(encoder.submodel for encoder in self.conditioning.encoders)
        made = {"encoder_hidden_states": encoders, "sample": "the configuration of vae", "latents": "unet"}
        return {**self.conditioning.origins, **made}

    def examples(self) -> Iterator[Example]:
        """Requests that try the model's files."""
        yield Example("guidance", ImageRequest("a", negative_prompt="b", steps=2, guidance_scale=2.0, seed=0))
        edge = self.config.sizes.min
        for text in dict.fromkeys(tokenizer.last for tokenizer in self.conditioning.tokenizers):
            request = ImageRequest(text, steps=2, width=edge, height=edge, guidance_scale=1.0, seed=0)
            yield Example(f"the prompt '{text}'", request)

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
        size, guidance = self.config.size_of(request), self.config.guidance_of(request)
        sampler = self.config.sampler_of(request)
        prompts = self.conditioning.tokenize(request.prompt, request.negative_prompt, guidance.guided)
        added = self._time_ids(request, size, guidance.rows)
        starts = noises(request.seed, request.images, self.config.vae.shape(*size), request.latents)
        return self._draw(_Job(prompts, added, guidance, sampler, starts, request.preview_every))

    def _time_ids(self, request: ImageRequest, size: tuple[int, int], rows: int) -> Arrays:
        """The sizes that a model with added conditions receives for a picture of this size (height, width)."""
        given = request.told_sizes
        if self.config.added is None:
            for field in given:
                raise InvalidInput(field, "cannot be told to this model, which has no such condition: leave it out")
            return {}
        original, aim = given.get("original_size", size), given.get("target_size", size)
        row = np.array([*original, *given.get("crop_top_left", (0, 0)), *aim], np.float32)
        return {"time_ids": np.tile(row, (rows, 1))}

    def _draw(self, job: _Job) -> Pipeline:
        text = yield from self.conditioning.encode(job.prompts)
        conditions = {"encoder_hidden_states": text.states, **text.pooled, **job.added}
        for index, noise in enumerate(job.noises):
            latents = yield from self._denoise(job, index, noise, conditions)
            image = yield from self._decode(latents)
            yield ImageReady(image, index, noise.seed)

    def _denoise(self, job: _Job, index: int, noise: Noise, conditions: Arrays) -> Part[Latents]:
        """From noise to clean latents [1, channels, height, width]."""
        steps = len(job.sampler.schedule)
        walk = Walk(job.sampler, noise.start(), noise.fresh)
        while walk.latents is None:
            done = walk.step
            time = np.full(job.guidance.rows, walk.time, np.float32)
            outputs = yield from run("unet", sample=job.guidance.batch(walk.x), timestep=time, **conditions)
            clean = walk.advance(job.guidance.combine(outputs["noise_pred"]))
            if walk.step > done:
                shown = job.preview_every and walk.step % job.preview_every == 0
                preview = (yield from self._decode(clean)) if shown else None
                yield Progress(index * steps + walk.step, len(job.noises) * steps, preview)
        return walk.latents

    def _decode(self, latents: Latents) -> Part[Array]:
        """The picture of latents [1, channels, height, width]: uint8 RGB [height, width, 3]."""
        vae, multiple = self.config.vae, self.config.sizes.multiple // self.config.vae.scale_factor
        return decode(vae.unscaled(latents), _pixels, vae.scale_factor, self.decodes_at_once, multiple)


def _encoders(config: DiffusionConfig) -> Sequence[TextEncoder]:
    return TWO_ENCODERS if config.added else ENCODER


def _pixels(latents: Latents) -> Part[Latents]:
    """The pixels [3, height, width] of unscaled latents."""
    outputs = yield from run("vae_decoder", latents=latents)
    (image,) = outputs["image"]
    return np.asarray(image)
