"""POST /sdapi/v1/txt2img and /sdapi/v1/img2img: pictures, with their parameters in the files and beside them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from fastapi import APIRouter

from runtime.diffusion.infotext import KEY, infotext
from runtime.diffusion.labels import shown
from runtime.tasks.image import ImageAbilities, ImageReady, ImageRequest
from runtime.vision.images import encode_image
from serving.dialects.a1111.canvas import USUAL_BLUR
from serving.dialects.a1111.choosing import abilities, checkpoint
from serving.dialects.a1111.clients import Client, Sender, Settings, merged
from serving.dialects.a1111.drawing import FIELDS, Work, work
from serving.dialects.a1111.fields import Drawing, ImageToImage, Options, TextToImage
from serving.dialects.a1111.jobs import Job, Jobs
from serving.dialects.a1111.scripts import cell_of
from serving.dialects.http.running import run
from serving.dialects.http.words import in_words
from serving.host.models import ModelHost

PROGRAM: Final = f"enginecast {version('enginecast')}"
PICTURES: Final = frozenset({"init_images", "mask", "alwayson_scripts"})
"""Fields with pictures, which are not sent back."""


@dataclass(frozen=True)
class Drawn:
    """A picture as a PNG file in base64, its parameters as text, its seed, and what it was drawn from."""

    file: str
    text: str
    seed: int
    prompt: str
    negative_prompt: str


@dataclass
class Studio:
    """Draws for clients."""

    host: ModelHost
    jobs: Jobs
    settings: Settings

    async def draw(self, message: Drawing, client: Client, name: str) -> dict[str, Any]:
        """The response to a message. Its job can be watched and stopped meanwhile; a job that is stopped has the
        pictures that were finished before.
        """
        options = merged(self.settings.of(client), message.override_settings)
        status = checkpoint(self.host, options)
        able = abilities(status)
        with in_words(FIELDS, parts=False):
            made = await asyncio.to_thread(work, message, options, able, self.host.scripts)
            with self.jobs.job(client, message.force_task_id, len(made.requests), name) as job:
                painting = _Painting(self.host, status.name, made, job, options, message, able)
                await painting.run()
        return _response(message, status.name, painting)


@dataclass
class _Painting:
    """A job at work, and what it has drawn until now."""

    host: ModelHost
    model: str
    made: Work
    job: Job
    options: Options
    message: Drawing
    able: ImageAbilities | None
    drawn: list[Drawn] = field(default_factory=list)

    async def run(self) -> None:
        """Draw every batch that is not skipped, until the job is stopped."""
        for number, request in enumerate(self.made.requests):
            if self.job.interrupted:
                break
            self.job.next(number)
            await self._finished(asyncio.create_task(self._batch(request)))

    async def _finished(self, batch: asyncio.Task[None]) -> None:
        """Wait until a batch has ended, or was stopped by its job. If the client leaves, it is stopped, too."""
        self.job.work = batch
        try:
            await asyncio.wait({batch})
        finally:
            self.job.work = None
            batch.cancel()
            await asyncio.wait({batch})
        if not batch.cancelled():
            batch.result()

    async def _batch(self, request: ImageRequest) -> None:
        async with aclosing(run(self.host, self.model, request)) as events:
            async for event in events:
                self.job.note(event)
                if isinstance(event, ImageReady):
                    self.drawn.append(await asyncio.to_thread(self._picture, request, event))

    def _picture(self, request: ImageRequest, ready: ImageReady) -> Drawn:
        picture = np.asarray(ready.image, np.uint8)
        if self.made.ground is not None:
            picture = self.made.ground.finished(picture)
        defaults = self.able.defaults if self.able else None
        cell = cell_of(request, ready.index)
        facts = {} if cell else self.made.facts
        more = {**_masking(self.message), **facts, "Model": self.model, "Version": PROGRAM}
        changed = cell is not None or ready.prompt is not None or ready.negative_prompt is not None
        request = _drawn_from(cell or request, ready)
        prompt = None if changed else self.message.prompt
        text = infotext(request, ready.seed, picture.shape[:2], more, defaults, prompt)
        texts = {} if self.options.enable_pnginfo is False else {KEY: text}
        file = base64.b64encode(encode_image(picture, texts=texts)).decode()
        return Drawn(file, text, ready.seed, prompt or request.prompt, request.negative_prompt)


def _drawn_from(request: ImageRequest, ready: ImageReady) -> ImageRequest:
    """The request with the prompts that scripts made of its own."""
    negative = request.negative_prompt if ready.negative_prompt is None else ready.negative_prompt
    return replace(request, prompt=request.prompt if ready.prompt is None else ready.prompt, negative_prompt=negative)


def _masking(message: Drawing) -> dict[str, str]:
    """The web UI's values of a masked picture."""
    if not isinstance(message, ImageToImage) or not message.mask:
        return {}
    blur = USUAL_BLUR if message.mask_blur is None else message.mask_blur
    found = {"Mask blur": f"{blur:g}", "Masked content": ("fill", "original")[message.inpainting_fill]}
    if message.inpaint_full_res:
        found |= {"Inpaint area": "Only masked", "Masked area padding": str(message.inpaint_full_res_padding)}
    return found


def _response(message: Drawing, model: str, painting: _Painting) -> dict[str, Any]:
    shown_fields = {} if isinstance(message, ImageToImage) and message.include_init_images else PICTURES
    return {
        "images": [one.file for one in painting.drawn] if message.send_images else [],
        "parameters": message.model_dump(mode="json", exclude=set(shown_fields)),
        "info": json.dumps(_info(message, model, painting), ensure_ascii=False),
    }


def _info(message: Drawing, model: str, painting: _Painting) -> Mapping[str, Any]:
    """What the web UI says of drawn pictures (its processing.py, Processed.js)."""
    request, drawn = painting.made.requests[0], painting.drawn
    defaults = painting.able.defaults if painting.able else None
    steps, scale, sampler = request.steps, request.guidance_scale, request.sampler
    if defaults is not None:
        steps, scale = steps or defaults.steps, defaults.guidance_scale if scale is None else scale
        sampler = sampler or defaults.sampler
    seeds: Sequence[int] = [one.seed for one in drawn]
    return {
        "prompt": message.prompt,
        "all_prompts": [one.prompt for one in drawn],
        "negative_prompt": message.negative_prompt,
        "all_negative_prompts": [one.negative_prompt for one in drawn],
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": shown(sampler)[0] if sampler else None,
        "cfg_scale": scale,
        "steps": steps,
        "batch_size": message.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 1 if painting.made.facts and len(drawn) > 1 else 0,
        "infotexts": [one.text for one in drawn],
        "styles": message.styles or [],
        "job_timestamp": painting.job.timestamp,
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": PROGRAM,
        "interrupted": painting.job.interrupted,
    }


def add(routes: APIRouter, studio: Studio) -> None:
    """Add the endpoints."""

    @routes.post("/sdapi/v1/txt2img")
    async def text_to_image(message: TextToImage, client: Sender) -> dict[str, Any]:
        return await studio.draw(message, client, "txt2img")

    @routes.post("/sdapi/v1/img2img")
    async def image_to_image(message: ImageToImage, client: Sender) -> dict[str, Any]:
        return await studio.draw(message, client, "img2img")
