"""Requests as the pipelines of diffusers draw them, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from runtime.diffusion.variation import random_stream
from runtime.errors import UnsupportedModel
from runtime.optional import require
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, PictureFile, decoded

INPAINTED: Final = (4, 9)
"""Channels of the UNets that diffusers' pipeline for inpainting takes."""


class Library:
    """The checkpoint in `folder` with what is added to it, as the pipeline class that its model_index.json names. The
    additions are paths by kind and name: LoRA files ("adapter") and control networks ("controlnet").
    """

    def __init__(self, folder: Path, additions: Mapping[str, Mapping[str, Path]]) -> None:
        self._torch, self._diffusers = require("torch", "export"), require("diffusers", "export")
        self._plain = _quiet(self._diffusers.DiffusionPipeline.from_pretrained(folder, dtype=self._torch.float32))
        self._plain.watermark = None  # Stable Diffusion XL has one where a package for it is installed
        self._loras, self._networks = additions.get("adapter", {}), additions.get("controlnet", {})
        for name, path in self._loras.items():
            require("peft", "reference")
            self._plain.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        self._pipeline, self._controlling = cache(self._made), cache(self._controlled)

    def __call__(self, requests: Sequence[ImageRequest]) -> Iterator[Picture]:
        """The pictures of requests with the same steps and guidance, together where they are of prompts alone."""
        if any(one.image is not None or one.controls or self._loras for one in requests):
            for one in requests:
                yield self._alone(one)
        else:
            yield from self._drawn(self._plain, requests, latents=self._noise(requests))

    def _alone(self, request: ImageRequest) -> Picture:
        if self._loras:
            weights = [request.loras.get(name, 0.0) for name in self._loras]
            self._plain.set_adapters(list(self._loras), weights)
        if request.controls:
            return self._along(request)
        if request.image is None:
            return next(self._drawn(self._plain, [request], latents=self._noise([request])))
        return self._changed(request, _opened(request.image))

    def _along(self, request: ImageRequest) -> Picture:
        """A picture drawn with control networks."""
        return next(
            self._drawn(
                self._controlling(tuple(one.name for one in request.controls)),
                [request],
                image=[_opened(one.image) for one in request.controls],
                controlnet_conditioning_scale=[one.scale for one in request.controls],
                latents=self._noise([request]),
            )
        )

    def _changed(self, request: ImageRequest, picture: Image.Image) -> Picture:
        """A picture drawn on another. Its noise is the library's own: these pipelines take none."""
        given = {"image": picture, "strength": request.strength}
        given["generator"] = self._torch.Generator().manual_seed(request.seed or 0)
        if request.mask is None:
            return next(self._drawn(self._pipeline("AutoPipelineForImage2Image"), [request], **given))
        channels = self._plain.unet.config.in_channels
        if channels not in INPAINTED:
            raise UnsupportedModel(
                f"diffusers' pipeline for inpainting takes UNets of 4 or 9 channels, this one has {channels}: leave "
                "--source out"
            )
        pipeline, mask = self._pipeline("AutoPipelineForInpainting"), _opened(request.mask).convert("L")
        drawn = next(self._drawn(pipeline, [request], mask_image=mask, **given))
        pasted = pipeline.image_processor.apply_overlay(mask, picture, Image.fromarray(drawn))
        return np.asarray(pasted.convert("RGB"))

    def _drawn(self, pipeline: Any, requests: Sequence[ImageRequest], **given: Any) -> Iterator[Picture]:
        images = pipeline(
            [request.prompt for request in requests],
            num_inference_steps=requests[0].steps,
            guidance_scale=requests[0].guidance_scale,
            output_type="np",
            **given,
        ).images
        yield from np.round(images * 255).astype(np.uint8)

    def _noise(self, requests: Sequence[ImageRequest]) -> Any:
        """What ours draws from, too."""
        config = self._plain.unet.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        noise = [random_stream(request.seed or 0).standard_normal(shape, np.float32) for request in requests]
        return self._torch.from_numpy(np.concatenate(noise))

    def _made(self, kind: str) -> Any:
        """A pipeline of the same networks by the library's class of that name."""
        return _quiet(getattr(self._diffusers, kind).from_pipe(self._plain))

    def _controlled(self, names: Sequence[str]) -> Any:
        """A pipeline of the same networks with these control networks."""
        load = partial(self._diffusers.ControlNetModel.from_pretrained, dtype=self._torch.float32)
        networks = [load(self._networks[name]) for name in names]
        kind = type(self._plain).__name__.replace("Pipeline", "ControlNetPipeline")
        return _quiet(getattr(self._diffusers, kind).from_pipe(self._plain, controlnet=networks))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _opened(picture: Picture | PictureFile) -> Image.Image:
    return Image.fromarray(decoded(picture))
