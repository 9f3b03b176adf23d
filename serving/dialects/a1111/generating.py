"""POST /sdapi/v1/txt2img and /sdapi/v1/img2img: pictures, with their parameters in the files and beside them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter

from runtime.diffusion.labels import shown
from serving.dialects.a1111.choosing import SHORT, abilities, checkpoint, digest
from serving.dialects.a1111.clients import Client, Sender, Settings, merged
from serving.dialects.a1111.drawing import FIELDS, work
from serving.dialects.a1111.fields import Drawing, ImageToImage, TextToImage
from serving.dialects.a1111.jobs import Jobs
from serving.dialects.a1111.painting import PROGRAM, Painting
from serving.dialects.a1111.recalled import with_infotext
from serving.dialects.a1111.refining import refiner
from serving.dialects.http.words import in_words
from serving.host.models import ModelHost

PICTURES: Final = frozenset({"init_images", "mask", "alwayson_scripts"})
"""Fields with pictures, which are not sent back."""


@dataclass
class Studio:
    """Draws for clients."""

    host: ModelHost
    jobs: Jobs
    settings: Settings

    async def draw(self, message: Drawing, client: Client, name: str) -> dict[str, Any]:
        """The response to a message. Its job can be watched and stopped meanwhile; a job that is stopped has the
        pictures that were finished before, and the newest preview.
        """
        message = with_infotext(message)
        options = merged(self.settings.of(client), message.override_settings)
        status = checkpoint(self.host, options)
        able = abilities(status)
        with in_words(FIELDS, parts=False):
            by = refiner(message, self.host, status.name)
            made = await asyncio.to_thread(work, message, options, able, self.host.scripts)
            with self.jobs.job(client, message.force_task_id, len(made.requests), name) as job:
                painting = Painting(self.host, status.name, made, job, options, message, able, by)
                await painting.run()
        return _response(message, status.name, painting)


def _response(message: Drawing, model: str, painting: Painting) -> dict[str, Any]:
    shown_fields = {} if isinstance(message, ImageToImage) and message.include_init_images else PICTURES
    return {
        "images": [one.file for one in painting.drawn] if message.send_images else [],
        "parameters": message.model_dump(mode="json", exclude=set(shown_fields)),
        "info": json.dumps(_info(message, model, painting), ensure_ascii=False),
    }


def _info(message: Drawing, model: str, painting: Painting) -> Mapping[str, Any]:
    """What the web UI says of drawn pictures (its processing.py, Processed.js)."""
    request, drawn = painting.made.requests[0], painting.drawn
    defaults = painting.able.defaults if painting.able else None
    steps, scale, sampler = request.steps, request.guidance_scale, request.sampler
    if defaults is not None:
        steps, scale = steps or defaults.steps, defaults.guidance_scale if scale is None else scale
        sampler = sampler or defaults.sampler
    seeds: Sequence[int] = [one.seed for one in drawn]
    down, across = request.noise_size or (-1, -1)
    return {
        "prompt": message.prompt,
        "all_prompts": [one.prompt for one in drawn],
        "negative_prompt": message.negative_prompt,
        "all_negative_prompts": [one.negative_prompt for one in drawn],
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed if request.variation_seed is None else request.variation_seed,
        "all_subseeds": [one.subseed for one in drawn],
        "subseed_strength": request.variation_strength or 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": shown(sampler)[0] if sampler else None,
        "cfg_scale": scale,
        "steps": steps,
        "batch_size": message.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": (digest(painting.host, model) or "")[:SHORT] or None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": across,
        "seed_resize_from_h": down,
        "denoising_strength": request.hires.strength if request.hires else request.strength,
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
