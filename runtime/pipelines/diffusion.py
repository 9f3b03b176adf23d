"""Text to picture with a latent diffusion model of Stable Diffusion's kind (Rombach et al. 2022, arXiv 2112.10752).

The submodels of a bundle; all their inputs and outputs but input_ids (int64) are float32:

    text_encoder    input_ids [batch, sequence] -> last_hidden_state [batch, sequence, hidden]
    unet            sample [batch, channels, height, width], timestep [batch], encoder_hidden_states [batch, sequence,
                    hidden] -> noise_pred, shaped as sample
    vae_decoder     latents [batch, channels, height, width], unscaled -> image [batch, 3, height, width], -1 to 1
    vae_encoder     image -> latents, for requests that begin with a picture

The sample of a model for inpainting has one channel more, the mask, and as many again as latents have, the masked
picture's.

Each control network that a build adds is a submodel, and its outputs are inputs of the unet:

    controlnet.NAME sample, timestep, encoder_hidden_states, control_picture [batch, 3, image_height, image_width], 0 to
                    1 -> down_block_residual_0 and so on, mid_block_residual

Image adapters that a build adds are further inputs of the unet:

    image_encoder   pixel_values [batch, 3, edge, edge], normalized as CLIP's -> image_embeds [batch, width]
    unet            image_embeds_0 [batch, 1, width] and so on, image_scales [batch, adapters]

A model with added conditions (Stable Diffusion XL; Podell et al. 2023, arXiv 2307.01952) differs in these:

    text_encoder    input_ids -> penultimate_hidden_state [batch, sequence, hidden]
    text_encoder_2  input_ids -> penultimate_hidden_state [batch, sequence, hidden_2], text_embeds [batch, projection]
    unet            encoder_hidden_states [batch, sequence, hidden + hidden_2], text_embeds, and time_ids [batch, 6]:
                    original height and width, top and left of the crop, intended height and width, in pixels; control
                    networks have these inputs, too

Its refiner has text_encoder_2 alone, and the last of 5 time_ids is a score of the picture's beauty.

The unet of a model that was distilled from guided predictions takes one input more: timestep_cond [batch, width], an
embedding of the guidance scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np

from runtime.diffusion.adapters import Adapters, adapted, names
from runtime.diffusion.added import time_ids
from runtime.diffusion.calls import Arrays, Part, run
from runtime.diffusion.canvas import Canvas, Original, prepare
from runtime.diffusion.conditioning import Conditioning, Prompts, TextEncoder
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.controls import Controlling, controlling
from runtime.diffusion.forecast import Forecast, Plan
from runtime.diffusion.guidance import Guidance
from runtime.diffusion.guides import Control, Style
from runtime.diffusion.latents import Decoder, Encoder, Noise, noises
from runtime.diffusion.schedule import Latents
from runtime.diffusion.second import Second, inside, second
from runtime.diffusion.solver import Sampler, Walk
from runtime.diffusion.styles import Styling, styling
from runtime.kept import Kept
from runtime.pipeline import Example, ModelPipeline, Note, Outputs, Pipeline, Progress, Room, reusing
from runtime.tasks.image import ImageReady, ImageRequest

PLAIN: Final = (TextEncoder("text_encoder", "tokenizer", "last_hidden_state"),)
"""The text encoder of models without added conditions."""
ADDED: Final = {
    "text_encoder": TextEncoder("text_encoder", "tokenizer", "penultimate_hidden_state"),
    "text_encoder_2": TextEncoder("text_encoder_2", "tokenizer_2", "penultimate_hidden_state", pooled="text_embeds"),
}
"""Those that models with added conditions may have."""


def encoders_of(config: DiffusionConfig) -> tuple[TextEncoder, ...]:
    """The text encoders of a model."""
    return PLAIN if config.added is None else tuple(ADDED[name] for name in config.added.text_encoders)


@dataclass(frozen=True)
class _Job:
    """One pass of a valid request. `original` is the picture that it begins with, `added` are the added conditions
    besides texts.
    """

    prompts: Prompts
    original: Original | None
    added: Arrays
    controls: Controlling
    styles: Styling
    guidance: Guidance
    sampler: Sampler
    plan: Plan
    noises: tuple[Noise, ...]
    preview_every: int
    hands_over: bool

    @property
    def steps(self) -> int:
        """The steps of a picture."""
        return len(self.sampler.schedule.steps)


class _Counts(NamedTuple):
    """How many steps are done before a pass, and the steps of all pictures."""

    done: int
    total: int


class DiffusionPipeline(ModelPipeline):
    """Draws the pictures of a request one after another. `tokenizers` are the folders of the encoders' tokenizers."""

    name: ClassVar[str] = "diffusion"
    task: ClassVar[str] = ImageRequest.task

    def __init__(self, config: DiffusionConfig, *tokenizers: Path, adapters: Adapters | None = None) -> None:
        self.config, self.adapters = config, adapters or Adapters()
        self.conditioning = Conditioning(encoders_of(config), tokenizers, config.zeros_for_empty)
        self.seen = Kept[bytes, Outputs]()
        self.decoder = Decoder("vae_decoder", config.vae, config.sizes.multiple)
        self.encoder = Encoder("vae_encoder", config.vae, config.sizes.multiple)

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> DiffusionPipeline:
        parsed = DiffusionConfig.parse(config)
        tokenizers = (root / encoder.tokenizer for encoder in encoders_of(parsed))
        return cls(parsed, *tokenizers, adapters=Adapters.open(root))

    @classmethod
    def abilities(cls, root: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of `ImageAbilities`."""
        return DiffusionConfig.parse(config).abilities(names(root)).model_dump(mode="json")

    @property
    def origins(self) -> Mapping[str, str]:
        encoders = " and ".join(encoder.submodel for encoder in self.conditioning.encoders)
        made = {"encoder_hidden_states": encoders, "sample": "the configuration of vae", "latents": "unet"}
        return {**self.conditioning.origins, **made}

    def examples(self) -> Iterator[Example]:
        edge = self.config.sizes.min
        picture = np.zeros((edge, edge, 3), np.uint8)
        masked: dict[str, Any] = {"image": picture, "mask": picture} if self.config.inpainting else {}
        yield Example("guidance", ImageRequest("a", negative_prompt="b", steps=2, guidance_scale=2.0, seed=0, **masked))
        for text in dict.fromkeys(tokenizer.last for tokenizer in self.conditioning.tokenizers):
            alone = ImageRequest(text, steps=2, width=edge, height=edge, guidance_scale=1.0, seed=0, **masked)
            yield Example(f"the prompt '{text}'", alone)
        if self.config.controls is not None:
            controls = tuple(Control(name, picture) for name in self.config.controls.names)
            yield Example(
                "controls", ImageRequest("a", steps=2, width=edge, height=edge, seed=0, controls=controls, **masked)
            )
        if self.config.styles is not None:
            styles = tuple(Style(name, picture) for name in self.config.styles.names)
            yield Example(
                "styles", ImageRequest("a", steps=2, width=edge, height=edge, seed=0, styles=styles, **masked)
            )
        if self.config.vae.encoder:
            drawn_on = ImageRequest("a", steps=2, strength=0.5, seed=0, **{"image": picture, **masked})
            yield Example("a picture to begin with", drawn_on)

    def keep_within(self, room: Mapping[str, float]) -> Sequence[str]:
        return [*self.decoder.keep_within(room), *self.encoder.keep_within(room)]

    def remember(self, room: Room) -> None:
        self.seen = Kept(room.features)

    def __call__(self, request: ImageRequest) -> Pipeline:
        """The generator that draws: `Progress` after every step of all pictures, `ImageReady` after every picture.
        Raises InvalidInput before any work; the generator raises EngineError for numbers that are not finite.
        """
        job = self._job(request, self.config.sampler_of(request))
        again = second(self.config, request, job.noises[0].seed)
        with inside():
            later = None if again is None else (again, self._job(again.request, again.sampler))
        drawing = adapted(self._draw(job, later), self.adapters.inputs(request.loras))
        if not self.seen.most:
            return drawing
        return reusing(drawing, {encoder.submodel for encoder in self.conditioning.encoders}, self.seen)

    def _job(self, request: ImageRequest, sampler: Sampler) -> _Job:
        """One pass of a request. Raises InvalidInput."""
        config, size, guidance = self.config, self.config.size_of(request), self.config.guidance_of(request)
        texts = request.prompt, request.negative_prompt
        prompts = self.conditioning.tokenize(*texts, guidance.guided, request.prompt_weights)
        added = time_ids(config.added, request.conditions, size, guidance.rows)
        plan = config.plan_of(request, sampler)
        controls = controlling(config.controls, request.controls, size, sampler, request.guess_mode)
        starts = noises(
            request.seed, request.images, config.vae.shape(*size), request.latents, config.variation_of(request)
        )
        original, hands_over = config.original_of(request), request.denoising_end is not None
        styles, preview = styling(config.styles, request.styles), request.preview_every
        return _Job(prompts, original, added, controls, styles, guidance, sampler, plan, starts, preview, hands_over)

    def _draw(self, job: _Job, later: tuple[Second, _Job] | None) -> Pipeline:
        conditions = yield from self._conditions(job)
        further = conditions if later is None else (yield from self._conditions(later[1]))
        steps = job.steps + (0 if later is None else later[1].steps)
        ground = yield from prepare(job.original, self.encoder, job.sampler, self.config.inpainting)
        left_out = 0
        for index, noise in enumerate(job.noises):
            canvas, counts, forecast = ground, _Counts(index * steps, len(job.noises) * steps), Forecast(job.plan)
            latents = yield from self._denoise(job, noise, canvas, conditions, counts, forecast)
            left_out += forecast.left_out
            if later is not None:
                again, counts = later[1], _Counts(counts.done + job.steps, counts.total)
                canvas = Canvas((yield from later[0].enlarged(latents, self.decoder, self.encoder)))
                every = Forecast(again.plan)
                latents = yield from self._denoise(again, again.noises[index], canvas, further, counts, every)
            handed = job.sampler.handed_over(latents)[0] if job.hands_over else None
            yield ImageReady(canvas.finished((yield from self.decoder(latents))), index, noise.seed, handed)
        if left_out:
            yield Note(f"in {left_out} of {job.plan.steps * len(job.noises)} steps the UNet's output was forecast")

    def _conditions(self, job: _Job) -> Part[Arrays]:
        """The inputs of the denoiser that stay the same in all steps."""
        text = yield from self.conditioning.encode(job.prompts)
        styles = yield from job.styles.encode(job.guidance.rows)
        return {"encoder_hidden_states": text.states, **text.pooled, **job.added, **styles}

    def _denoise(
        self, job: _Job, noise: Noise, canvas: Canvas, conditions: Arrays, counts: _Counts, forecast: Forecast
    ) -> Part[Latents]:
        """From noise to clean latents [1, channels, height, width]."""
        walk = canvas.walk(job.sampler, noise)
        while walk.latents is None:
            done, guidance = walk.step, job.guidance.at(walk.step, job.steps)
            output = forecast.output(walk, guidance.rows)
            if output is None:
                output = yield from self._predict(job, walk, canvas, guidance, conditions)
                forecast.add(walk, output)
            clean = walk.advance(guidance.combine(output))
            if walk.step > done:
                shown = job.preview_every and walk.step % job.preview_every == 0
                preview = canvas.finished((yield from self.decoder(clean))) if shown else None
                yield Progress(counts.done + walk.step, counts.total, preview)
        return walk.latents

    def _predict(self, job: _Job, walk: Walk, canvas: Canvas, guidance: Guidance, conditions: Arrays) -> Part[Latents]:
        """The denoiser's output [rows, channels, height, width] for the present latents."""
        time = np.full(guidance.rows, walk.time, np.float32)
        inputs = {"sample": guidance.batch(walk.x), "timestep": time, **guidance.of_rows(conditions)}
        residuals = yield from job.controls(walk.calls, inputs)
        inputs["sample"] = canvas.input(inputs["sample"])
        outputs = yield from run("unet", **inputs, **residuals, **guidance.conditions)
        return outputs["noise_pred"]
