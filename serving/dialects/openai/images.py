"""POST /v1/images/generations and /v1/images/edits (https://platform.openai.com/docs/api-reference/images)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final

import numpy as np
from fastapi import APIRouter, Form, Request
from starlette.responses import JSONResponse, Response

from runtime.bundle.signature import Array
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.http.pictures import file_text
from serving.dialects.http.running import Begun, Lines, Stream, begun, collected, run
from serving.dialects.http.words import events_in_words, in_words
from serving.dialects.openai import errors, sse
from serving.dialects.openai.drawing import WORDS, check_once, image_request, pictures, preview_every
from serving.dialects.openai.fields import Drawing, Edit
from serving.dialects.openai.shared import now
from serving.host.models import ModelHost

FORM: Final[Any] = {"max_files": 20, "max_fields": 100, "max_part_size": 1 << 16}
"""The limits of forms: numbers of files and of texts, bytes of a text."""
QUALITY: Final = 100
"""Of JPEG and WebP files, where a request does not say."""
UNCOUNTED: Final = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""Clients expect it; tokens of prompts for pictures are not counted."""


def add(routes: APIRouter, host: ModelHost) -> None:
    """Add the endpoints for a host."""

    @routes.post("/v1/images/generations")
    async def generations(body: Drawing) -> Response:
        with in_words(WORDS):
            request = image_request(body, preview_every(host, body))
        return await _answered(body, request, "image_generation")

    @routes.post("/v1/images/edits", form_limits=FORM)
    async def edits(body: Annotated[Edit, Form()], sent: Request) -> Response:
        check_once(await sent.form())
        with in_words(WORDS):
            request = image_request(body, preview_every(host, body), **await pictures(host, body))
        return await _answered(body, request, "image_edit")

    async def _answered(body: Drawing, request: ImageRequest, kind: str) -> Response:
        events = events_in_words(run(host, body.model, request), WORDS)
        drawn = Drawn(body, kind)
        if body.stream:
            return Stream(await begun(events), drawn.events, errors.failure, sse.MEDIA)
        return JSONResponse(await drawn.whole(events))


class Drawn:
    """The pictures of a request, all at once or one after the other, in events whose names begin with `kind`."""

    def __init__(self, body: Drawing, kind: str) -> None:
        self._kind, self._created = kind, now()
        self._format = body.output_format or "png"
        self._quality = QUALITY if body.output_compression is None else body.output_compression
        self._partial, self._count = body.partial_images or 0, body.n or 1

    async def whole(self, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        """All pictures, with the seed of each."""
        ready = [event for event in await collected(events) if isinstance(event, ImageReady)]
        data = [{"b64_json": await self._text(one.image), "seed": one.seed} for one in ready]
        return {"created": self._created, "data": data, **self._facts(ready[0].image)}

    async def events(self, events: Begun) -> Lines:
        """Previews and pictures in server-sent events."""
        shown: dict[int, int] = {}  # previews of each picture
        async for event in events:
            match event:
                case Progress(step, total, preview) if preview is not None:
                    picture = (step - 1) * self._count // total
                    number = shown.get(picture, 0)
                    if number < self._partial and step * self._count % total:  # the last one is the picture itself
                        shown[picture] = number + 1
                        yield await self._event("partial_image", preview, partial_image_index=number)
                case ImageReady(image, index, seed):
                    yield await self._event("completed", image, index=index, seed=seed, usage=UNCOUNTED)

    async def _event(self, name: str, picture: Array, **more: Any) -> str:
        kind, text = f"{self._kind}.{name}", await self._text(picture)
        told = {"type": kind, "b64_json": text, "created_at": self._created, "quality": "auto"}
        return sse.event({**told, **self._facts(picture), **more}, kind)

    def _facts(self, picture: Array) -> dict[str, Any]:
        height, width = picture.shape[:2]
        return {"size": f"{width}x{height}", "output_format": self._format, "background": "opaque"}

    async def _text(self, picture: Array) -> str:
        return await file_text(np.asarray(picture, np.uint8), self._format, self._quality)
