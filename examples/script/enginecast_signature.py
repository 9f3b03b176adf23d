"""A script for enginecast that writes a text into the corner of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from runtime.errors import InvalidInput
from runtime.pipeline import Event, Note, Progress
from runtime.script import Arguments, Script
from runtime.tasks.image import ImageReady, ImageRequest


class SignatureArguments(Arguments):
    """What requests may state. Other arguments are refused by name."""

    text: str = Field(min_length=1, max_length=40)
    height: int = Field(default=12, ge=8, le=100)
    """Of the letters, in pixels."""


class Signature(Script[SignatureArguments]):
    """Signs every picture of a request, and leaves previews out, which are not signed."""

    summary: ClassVar[str] = "Write a text into the corner of pictures."
    takes: ClassVar[type[Arguments]] = SignatureArguments
    tasks: ClassVar[tuple[str, ...]] = (ImageRequest.task,)

    @classmethod
    def loaded(cls, model: Any) -> Sequence[str]:
        """When a model is loaded: a note on it."""
        return ["pictures can be signed"] if model.task == ImageRequest.task else []

    def before(self, request: ImageRequest) -> ImageRequest:
        """Before the job: check or change the request."""
        if request.denoising_end is not None:
            raise InvalidInput("scripts.signature", "signs finished pictures: leave out denoising_end")
        return replace(request, preview_every=0)

    def during(self, event: Event) -> Iterator[Event]:
        """During the job: see, change or leave out its events."""
        match event:
            case ImageReady():
                yield replace(event, image=self._signed(event.image))
            case Progress(preview=preview) if preview is not None:
                yield replace(event, preview=None)
            case _:
                yield event

    def after(self) -> Iterator[Event]:
        """After the job: further events, such as a note that comes with the result."""
        yield Note(f"signed by {self.arguments.text}")

    def _signed(self, picture: Any) -> Any:
        page = Image.fromarray(np.asarray(picture, np.uint8))
        font = ImageFont.load_default(self.arguments.height)
        place = page.width - 2, page.height - 2
        ImageDraw.Draw(page).text(place, self.arguments.text, "white", font, anchor="rs", stroke_width=1, stroke_fill=0)
        return np.array(page, np.uint8)
