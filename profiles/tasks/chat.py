"""What is measured of models that answer.

first_token  seconds until the first token about a picture
prefill      prompt tokens a second
decode       new tokens a second
"""

from __future__ import annotations

import bisect
import copy
import time
from typing import Final

import numpy as np

from profiles.probes import Probe, ProbeSettings, seconds
from profiles.task import ProfileTask
from runtime.bundle.signature import nbytes
from runtime.engine import Engine
from runtime.errors import BundleError, InvalidInput
from runtime.language.text import Message
from runtime.pipeline import Engines, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest

QUESTION: Final = "what color is the background?"
EDGE: Final = 128
"""Edge in pixels of the picture that is asked about; every model resizes it to its own."""


def picture_question(settings: ProbeSettings) -> ChatRequest:
    picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    return ChatRequest((Message("user", (picture, QUESTION)),), max_tokens=1, temperature=0.0, beams=1)


class Clock:
    """Engines that note when each call begins."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.begun: list[tuple[str, float]] = []

    def __getitem__(self, submodel: str, /) -> Engine:
        self.begun.append((submodel, time.perf_counter()))
        return self._engines[submodel]


def chat_probes(model: LoadedModel, settings: ProbeSettings) -> list[Probe]:
    pipeline = _endless(model)
    text, prompt_tokens = _text(pipeline, settings.prompt_tokens)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": settings.new_tokens}

    def request(max_tokens: int) -> ChatRequest:
        return ChatRequest((Message("user", (text,)),), max_tokens=max_tokens, temperature=0.0, beams=1)

    def answer(asked: ChatRequest) -> None:
        list(drive(pipeline(asked), model.engines))

    def decode() -> float:
        clock = Clock(model.engines)
        list(drive(pipeline(request(settings.new_tokens)), clock))
        chosen = [begun for submodel, begun in clock.begun if submodel == "token_embedding"][
            1:
        ]  # the first embeds the prompt
        return len(chosen) / (time.perf_counter() - chosen[0])

    pipeline(request(settings.new_tokens)).close()  # the model says now whether it has room
    found = [
        Probe(
            "prefill",
            "tokens/s",
            lambda: prompt_tokens / seconds(lambda: answer(request(1))),
            {"prompt_tokens": prompt_tokens},
        ),
        Probe("decode", "tokens/s", decode, sizes, _bytes_per_token(model, prompt_tokens)),
    ]
    if pipeline.config.has_vision:
        asked = picture_question(settings)
        length = {"prompt_tokens": len(pipeline.prompt(asked).ids)}
        found.insert(0, Probe("first_token", "s", lambda: seconds(lambda: answer(asked)), length))
    return found


def _endless(model: LoadedModel) -> ChatPipeline:
    """The model's pipeline, but no token ends an answer: a fixed number of tokens is comparable, and random weights
    never stop anyway.
    """
    if not isinstance(model.pipeline, ChatPipeline):
        raise BundleError(
            f"bundle {model.bundle.name} holds a {model.bundle.manifest.pipeline} model that is no chat "
            "pipeline: it cannot be measured as "
            "one"
        )
    pipeline = copy.copy(model.pipeline)
    pipeline.config = pipeline.config.model_copy(update={"eos_token_ids": ()})
    return pipeline


def _text(pipeline: ChatPipeline, tokens: int) -> tuple[str, int]:
    """Words that make the longest prompt of at most so many tokens, template included, and its length."""

    def length(words: int) -> int:
        return len(pipeline.prompt(ChatRequest((Message("user", (" ".join(["a"] * words),)),))).ids)

    words = bisect.bisect_right(range(1, tokens + 1), tokens, key=length)
    if not words:
        raise InvalidInput(
            "prompt_tokens",
            f"is {tokens}, expected at least {length(1)}, which the model's template takes for one word",
        )
    return " ".join(["a"] * words), length(words)


def _bytes_per_token(model: LoadedModel, past: int) -> float:
    """What a decoding step must read: every weight of the decoder, and what its cache holds."""
    decoder = model.bundle.submodel("decoder")
    states = nbytes((state.past for state in decoder.signature.states), {"batch": 1, "past": past})
    return float(decoder.nbytes + states)


TASK: Final = ProfileTask(
    ChatRequest.task, "answers", frozenset({"prompt-tokens", "new-tokens"}), picture_question, chat_probes
)
