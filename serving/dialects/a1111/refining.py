"""A second model that goes on where the first one ends (refiner_checkpoint, refiner_switch_at)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from runtime.diffusion.infotext import as_drawn
from runtime.errors import InvalidInput
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.a1111.choosing import refining
from serving.dialects.a1111.fields import Drawing
from serving.dialects.http.running import run
from serving.host.models import ModelHost

NONE: Final = frozenset({"", "none"})


@dataclass(frozen=True)
class Refiner:
    """The model that draws the schedule from the share `switch` on."""

    model: str
    switch: float

    @property
    def facts(self) -> dict[str, str]:
        """What the parameters of a picture say of it."""
        return {"Refiner": self.model, "Refiner switch at": f"{self.switch:g}"}


def refiner(message: Drawing, host: ModelHost, model: str) -> Refiner | None:
    """The refiner of a message whose first model is this one, None where it has none. Raises InvalidInput."""
    name, switch = message.refiner_checkpoint or "", message.refiner_switch_at
    if name.casefold() in NONE or switch == 1:
        return None
    if switch is None or not 0 < switch < 1:
        raise InvalidInput(
            "refiner_switch_at", f"is {switch}, expected a number between 0 and 1: where the refiner goes on"
        )
    found = refining(host, name).name
    return None if found == model else Refiner(found, switch)


def later(request: ImageRequest, ready: ImageReady) -> ImageRequest:
    """The refiner's request for what the first model has drawn of one picture, whose scripts have done their work."""
    assert ready.latents is not None, "a request that ends early hands its latents over"
    one = replace(as_drawn(request.single(ready.index), ready), scripts={})
    return one.going_on(np.asarray(ready.latents[None], np.float32), ready.seed)


async def refined(host: ModelHost, model: str, request: ImageRequest, by: Refiner) -> AsyncGenerator[Event, None]:
    """The events of a request that one model begins and another one ends, counted over both."""
    request, done, handed = replace(request, denoising_end=by.switch), 0, list[ImageReady]()
    async with aclosing(run(host, model, request)) as events:
        async for event in events:
            match event:
                case Progress(step, total, preview):
                    done = total
                    yield Progress(step, max(step, round(total / by.switch)), preview)
                case ImageReady():
                    handed.append(event)
                case _:
                    yield event
    for number, ready in enumerate(handed):
        async with aclosing(run(host, by.model, later(request, ready))) as events:
            async for event in events:
                match event:
                    case Progress(step, total, preview):
                        yield Progress(done + number * total + step, done + len(handed) * total, preview)
                    case ImageReady():
                        yield replace(ready, image=event.image, latents=None)
                    case _:
                        yield event
