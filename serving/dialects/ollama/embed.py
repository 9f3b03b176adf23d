"""Vectors of texts and pictures: /api/embed, and /api/embeddings, its form of before."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Final

from runtime.tasks.embed import Embeddings, EmbedRequest
from serving.dialects.http.pictures import files_of
from serving.dialects.http.running import collected, nanoseconds, run
from serving.dialects.http.vectors import unit_vectors
from serving.dialects.http.words import in_words
from serving.dialects.ollama import fields, names
from serving.dialects.ollama.replies import Fields
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.terms import Terms

WORDS: Final = {"texts": "input"}
OLD_WORDS: Final = {"texts": "prompt"}


async def embed(host: ModelHost, body: fields.Embed) -> Fields:
    """Vectors of length 1, of the texts and then of the pictures."""
    began = perf_counter()
    pictures = await files_of(body.images or (), "images")
    with in_words(WORDS):
        found, done = await _vectors(host, body, EmbedRequest(tuple(body.input), pictures))
        vectors = unit_vectors(found, body.dimensions)
    total = perf_counter() - began
    return {
        "model": body.model,
        "embeddings": vectors.tolist(),
        "prompt_eval_count": found.prompt_tokens,
        "total_duration": nanoseconds(total),
        "load_duration": nanoseconds(max(0.0, total - done.queue_seconds - done.run_seconds)),
    }


async def embeddings(host: ModelHost, body: fields.Embedding) -> Fields:
    """The vector of a text, as the model gives it."""
    with in_words(OLD_WORDS):
        found, _ = await _vectors(host, body, EmbedRequest((body.prompt,)))
    return {"embedding": found.texts[0].tolist()}


async def _vectors(host: ModelHost, body: Any, request: EmbedRequest) -> tuple[Embeddings, Done]:
    events = await collected(run(host, names.known(host, body.model), request, Terms(body.keep_alive)))
    found = next(event for event in events if isinstance(event, Embeddings))
    return found, next(event for event in events if isinstance(event, Done))
