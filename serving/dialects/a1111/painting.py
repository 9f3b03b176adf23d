"""A job at work: its batches, what they draw, and the files that become of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final

import numpy as np

from runtime.diffusion.defaults import ImageAbilities
from runtime.diffusion.infotext import as_drawn, infotext
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture
from serving.dialects.a1111.canvas import USUAL_BLUR
from serving.dialects.a1111.drawing import Work
from serving.dialects.a1111.fields import Drawing, ImageToImage, Options
from serving.dialects.a1111.files import encoded
from serving.dialects.a1111.jobs import Job
from serving.dialects.a1111.refining import Refiner, refined
from serving.dialects.a1111.scripts import GRID, cell_of
from serving.dialects.http.running import run
from serving.host.models import ModelHost

PROGRAM: Final = f"enginecast {version('enginecast')}"
CONTENTS: Final = ("fill", "original", "latent noise", "latent nothing")
"""The web UI's names of what a masked part begins with."""


@dataclass(frozen=True)
class Drawn:
    """A picture as a file in base64, its parameters as text, its seeds, and what it was drawn from."""

    file: str
    text: str
    seed: int
    subseed: int
    prompt: str
    negative_prompt: str


@dataclass
class Painting:
    """A job at work, and what it has drawn until now."""

    host: ModelHost
    model: str
    made: Work
    job: Job
    options: Options
    message: Drawing
    able: ImageAbilities | None
    refiner: Refiner | None = None
    half: Picture | None = None
    """The newest preview of the picture that is being drawn."""
    drawn: list[Drawn] = field(default_factory=list)

    async def run(self) -> None:
        """Draw every batch that is not skipped, until the job is stopped. The newest preview of a batch that is stopped
        is its last picture.
        """
        for number, request in enumerate(self.made.requests):
            if self.job.interrupted:
                break
            self.job.next(number)
            self.half, before = None, len(self.drawn)
            await self._finished(asyncio.create_task(self._batch(request)))
            if self.half is not None and GRID not in request.scripts:
                index = len(self.drawn) - before
                ready = ImageReady(self.half, index, request.single(index).seed or 0)
                self.drawn.append(await asyncio.to_thread(self._picture, request, ready))

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
        async with aclosing(self._events(request)) as events:
            async for event in events:
                self.job.note(event)
                if isinstance(event, ImageReady):
                    self.half = None
                    self.drawn.append(await asyncio.to_thread(self._picture, request, event))
                elif isinstance(event, Progress) and event.preview is not None:
                    self.half = np.asarray(event.preview, np.uint8)

    def _events(self, request: ImageRequest) -> AsyncGenerator[Event, None]:
        if self.refiner is None:
            return run(self.host, self.model, request)
        return refined(self.host, self.model, request, self.refiner)

    def _picture(self, request: ImageRequest, ready: ImageReady) -> Drawn:
        picture = np.asarray(ready.image, np.uint8)
        if self.made.ground is not None:
            picture = self.made.ground.finished(picture)
        defaults = self.able.defaults if self.able else None
        cell = cell_of(request, ready.index)
        facts = {} if cell else self.made.facts
        refining = {} if self.refiner is None else self.refiner.facts
        more = {**_masking(self.message), **facts, **refining, "Model": self.model, "Version": PROGRAM}
        changed = cell is not None or ready.prompt is not None or ready.negative_prompt is not None
        request = as_drawn(cell or request.single(ready.index), ready)
        prompt = None if changed else self.message.prompt
        text = infotext(request, ready.seed, picture.shape[:2], more, defaults, prompt)
        file = encoded(picture, text, self.options)
        subseed = ready.seed if request.variation_seed is None else request.variation_seed
        return Drawn(file, text, ready.seed, subseed, prompt or request.prompt, request.negative_prompt)


def _masking(message: Drawing) -> dict[str, str]:
    """The web UI's values of a masked picture."""
    if not isinstance(message, ImageToImage) or not message.mask:
        return {}
    blur = USUAL_BLUR if message.mask_blur is None else message.mask_blur
    found = {"Mask blur": f"{blur:g}", "Masked content": CONTENTS[message.inpainting_fill]}
    if message.inpaint_full_res:
        found |= {"Inpaint area": "Only masked", "Masked area padding": str(message.inpaint_full_res_padding)}
    return found
