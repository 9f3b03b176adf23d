"""/api/generate: one prompt for a model that answers, or one for a model that draws."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import numpy as np
from starlette.responses import Response

from runtime.errors import InvalidInput
from runtime.language.text import Message as Turn
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.http.pictures import file_text, files_of
from serving.dialects.http.running import run
from serving.dialects.http.words import in_words
from serving.dialects.ollama import names
from serving.dialects.ollama.conversation import answer, kept, turn
from serving.dialects.ollama.fields import Generate
from serving.dialects.ollama.options import DRAWING, WORDS, given
from serving.dialects.ollama.replies import Pieces, Reply, respond
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.terms import Terms

SIZES: Final = ("width", "height", "steps")
OF_ANSWERS: Final = ("raw", "system", "format", "logprobs", "top_logprobs", "truncate")
"""Fields of models that answer."""
DRAWING_WORDS: Final = {**WORDS, "image": "images"}


async def generate(host: ModelHost, body: Generate) -> Response:
    """The answer to a prompt, or the picture; without a prompt the model is loaded, or with a keep-alive of 0
    unloaded.
    """
    reply = Reply(body.model, lambda text: {"response": text})
    if not body.prompt and not body.images:
        return await kept(host, body, reply)
    if host.status(names.known(host, body.model)).task == ImageRequest.task:
        return await draw(host, body, reply)
    _none_of(body, SIZES, "draws", "answers")
    if body.raw and body.system:
        raise InvalidInput("system", "does not go with raw: write it into the prompt")
    system = (Turn("system", (body.system,)),) if body.system else ()
    asked = await turn("user", body.prompt, body.images, "images")
    return await answer(host, body, (*system, asked), reply, raw=bool(body.raw))


async def draw(host: ModelHost, body: Generate, reply: Reply) -> Response:
    """A picture, drawn from the prompt and perhaps from another picture."""
    _none_of(body, OF_ANSWERS, "answers", "draws")
    if len(body.images or ()) > 1:
        raise InvalidInput("images", f"has {len(body.images or ())} pictures, and drawing begins with one: send one")
    pictures = await files_of(body.images or (), "images")
    options: dict[str, Any] = given(body.options, DRAWING, "draws")
    options |= {name: value for name in SIZES if (value := getattr(body, name)) is not None}
    with in_words(DRAWING_WORDS):
        request = ImageRequest(body.prompt or "", image=pictures[0] if pictures else None, **options)
    events = run(host, names.known(host, body.model), request, Terms(body.keep_alive))

    async def pieces(found: AsyncIterator[Event]) -> Pieces:
        image = ""
        async for event in found:
            match event:
                case Progress(step, total):
                    yield reply.piece("", completed=step, total=total)
                case ImageReady(picture):
                    image = await file_text(np.asarray(picture, np.uint8))
                case Done():
                    yield reply.last(event, image=image)

    return await respond(reply, reply.watched(events, DRAWING_WORDS), pieces, body.stream)


def _none_of(body: Generate, fields: tuple[str, ...], other: str, own: str) -> None:
    """Raise InvalidInput for a field of models that do something else."""
    for name in fields:
        if getattr(body, name):
            raise InvalidInput(name, f"is for a model that {other}, and this one {own}: leave it out")
