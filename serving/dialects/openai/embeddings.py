"""POST /v1/embeddings: texts and pictures to vectors (https://platform.openai.com/docs/api-reference/embeddings).

OpenAI has texts alone. Pictures come in the two ways that servers of such models have: as objects of `input`, such as
{"image": "data:..."}, or as the only part of `messages`, in place of `input`, as vLLM takes them.
"""

from __future__ import annotations

import base64
import math
from typing import Any, Final

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language.text import Part
from runtime.tasks.embed import Embeddings, EmbedRequest
from runtime.vision.images import Picture, PictureFile, lengths
from serving.dialects.http.fetching import Fetcher, Hosts
from serving.dialects.http.running import collected, run
from serving.dialects.http.vectors import unit_vectors
from serving.dialects.http.words import events_in_words, in_words
from serving.dialects.openai.conversation import picture, turns
from serving.dialects.openai.fields import Item, Wanted
from serving.host.models import ModelHost

WORDS: Final = {"texts": "input", "images": "input", "parts": "content"}
"""The clients' names of fields, by ours."""
LITTLE: Final = np.dtype("<f4")


def add(routes: APIRouter, host: ModelHost, hosts: Hosts) -> None:
    """Add the endpoint for a host; `hosts` are those that pictures may be fetched from."""

    @routes.post("/v1/embeddings")
    async def embeddings(body: Wanted) -> dict[str, Any]:
        with in_words(WORDS):
            async with Fetcher(hosts) as fetcher:
                parts = await _parts(body, fetcher)
            texts = tuple(part for part in parts if isinstance(part, str))
            images = tuple(part for part in parts if not isinstance(part, str))
            request = EmbedRequest(texts, images)
        events = await collected(events_in_words(run(host, body.model, request), WORDS))
        (found,) = (event for event in events if isinstance(event, Embeddings))
        _check_width(body, found)
        with in_words(WORDS):
            vectors = unit_vectors(found, body.dimensions)
        places = np.argsort([not isinstance(part, str) for part in parts], kind="stable")  # texts come first
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vectors[row], body.encoding_format)}
            for index, row in enumerate(np.argsort(places))
        ]
        return {"object": "list", "model": body.model, "data": data, "usage": _usage(found, images)}


async def _parts(body: Wanted, fetcher: Fetcher) -> list[Part]:
    """What to embed, in order. Raises InvalidInput."""
    if body.messages is not None:
        if body.input is not None:
            raise InvalidInput("messages", "and input exclude each other: send one of them")
        (parts,) = [turn.content for turn in await turns(body.messages, fetcher)]
        if len(parts) != 1:
            raise InvalidInput("messages", f"have {len(parts)} parts, and a vector is of one text or picture: send one")
        return list(parts)
    if body.input is None:
        raise InvalidInput("input", "is missing: send a text, a valid list of texts, or messages in its place")
    limits.PICTURES.count("input", sum(item.image is not None for item in body.input))
    return [await _part(item, f"input[{i}]", fetcher) for i, item in enumerate(body.input)]


async def _part(item: Item, field: str, fetcher: Fetcher) -> Part:
    match item.text, item.image:
        case str(text), None:
            return text
        case None, str(image):
            return await picture(image, f"{field}.image", fetcher)
    raise InvalidInput(field, "is a text or an image: send one of both")


def _check_width(body: Wanted, found: Embeddings) -> None:
    width = found.texts.shape[-1]
    if body.dimensions is not None and not 1 <= body.dimensions <= width:
        why = f"is {body.dimensions}, and the vectors of {body.model} have {width}: send 1 to {width}, or none"
        raise InvalidInput("dimensions", why)


def _usage(found: Embeddings, images: tuple[Picture | PictureFile, ...]) -> dict[str, int]:
    """Tokens of the texts, and pixels of the pictures where there are some, which have no tokens."""
    counted = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    return counted | ({"image_pixels": sum(math.prod(lengths(image)) for image in images)} if images else {})


def _written(vector: NDArray[np.float32], form: str | None) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(vector.astype(LITTLE).tobytes()).decode()
    return [float(value) for value in vector]
