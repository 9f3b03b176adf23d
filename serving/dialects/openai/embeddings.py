"""POST /v1/embeddings: texts to vectors (https://platform.openai.com/docs/api-reference/embeddings)."""

from __future__ import annotations

import base64
from typing import Any, Final

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray

from runtime.errors import InvalidInput
from runtime.tasks.embed import Embeddings, EmbedRequest
from serving.dialects.http.running import collected, run
from serving.dialects.http.words import events_in_words, in_words
from serving.dialects.openai.fields import Wanted
from serving.host.models import ModelHost

WORDS: Final = {"texts": "input"}
"""The clients' names of fields, by ours."""
LITTLE: Final = np.dtype("<f4")


def add(routes: APIRouter, host: ModelHost) -> None:
    """Add the endpoint for a host."""

    @routes.post("/v1/embeddings")
    async def embeddings(body: Wanted) -> dict[str, Any]:
        with in_words(WORDS):
            request = EmbedRequest(tuple(body.input))
        events = await collected(events_in_words(run(host, body.model, request), WORDS))
        (vectors,) = (event.texts for event in events if isinstance(event, Embeddings))
        width = vectors.shape[1]
        if body.dimensions not in (None, width):
            raise InvalidInput(
                "dimensions", f"is {body.dimensions}, and the vectors of {body.model} have {width}: send that or none"
            )
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}  # encoders do not count them
        return {"object": "list", "model": body.model, "data": data, "usage": usage}


def _written(vector: NDArray[np.float32], form: str | None) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(vector.astype(LITTLE).tobytes()).decode()
    return [float(value) for value in vector]
