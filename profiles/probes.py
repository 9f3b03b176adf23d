"""What is measured of a loaded model: one probe a metric, each run of which is one repetition.

    diffusion   <submodel> seconds a call, picture seconds for a whole one
    chat        <submodel> seconds a call, first_token seconds until the first token about a picture,
                prefill prompt tokens a second, decode new tokens a second

Pipelines are generators, so a submodel's inputs are found by running the pipeline against zeros: a call is measured at
the sizes, and with the guidance, that a request really gives it.
"""

from __future__ import annotations

import bisect
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from pydantic import Field

from runtime.bundle.manifest import Frozen, Submodel
from runtime.bundle.signature import Array, Signature, nbytes
from runtime.engine import Engine
from runtime.errors import BundleError, InvalidInput
from runtime.language.text import Message
from runtime.pipeline import Call, Engines, Outputs, Pipeline, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest

PROMPT: Final = "a large red circle at the top left on a white background"
QUESTION: Final = "what color is the background?"
EDGE: Final = 128
"""Edge in pixels of the picture that is asked about; every model resizes it to its own."""


class Settings(Frozen):
    """What to ask of the model. Sizes in pixels, None is the model's default."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    prompt_tokens: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=64, ge=2)


@dataclass(frozen=True)
class Probe:
    """One metric: `run` measures it once. `nbytes` is what must be read from memory for one unit, where that bounds a
    rate.
    """

    metric: str
    unit: str
    run: Callable[[], float]
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    nbytes: float | None = None


def probes(model: LoadedModel, settings: Settings) -> list[Probe]:
    """Everything that can be measured of this model. Raises InvalidInput when the model refuses the settings."""
    request = _image_request(settings) if model.task == "image" else _picture_question()
    found = _submodel_probes(model, request)
    return found + (_diffusion_probes(model, settings) if model.task == "image" else _chat_probes(model, settings))


def planned_calls(pipeline: Pipeline, submodels: Mapping[str, Submodel]) -> dict[str, Call]:
    """The first call of every submodel that a pipeline makes, found without any engine: each call is answered with
    zeros.
    """
    found: dict[str, Call] = {}
    outputs: Outputs | None = None
    try:
        while True:
            item = pipeline.send(outputs)
            outputs = None
            if isinstance(item, Call):
                found.setdefault(item.submodel, item)
                outputs = _zeros(submodels[item.submodel].signature, item.inputs)
    except StopIteration:
        return found


def _zeros(signature: Signature, inputs: Mapping[str, Array]) -> Outputs:
    lengths = {
        dim.name: dim.opt for tensor in signature.outputs for dim in tensor.dims if not isinstance(dim, int)
    } | signature.bind(inputs)
    return {tensor.name: np.zeros(tensor.shape(lengths), tensor.dtype) for tensor in signature.outputs}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _submodel_probes(model: LoadedModel, request: Any) -> list[Probe]:
    """The latency of every submodel without states; one that the request does not need runs on a sample of its usual
    size.
    """
    submodels = {submodel.name: submodel for submodel in model.bundle.manifest.submodels}
    calls = planned_calls(model.pipeline(request), submodels)
    found = []
    for name, submodel in submodels.items():
        if submodel.signature.states:
            continue
        usual = {dim.name: dim.opt for dim in submodel.signature.dims.values()} | {"batch": 1}
        inputs = calls[name].inputs if name in calls else submodel.signature.sample(usual)
        shapes: dict[str, int | float | str] = {
            tensor: "x".join(map(str, array.shape)) for tensor, array in inputs.items()
        }
        found.append(Probe(name, "s", _latency(model.engines[name], inputs), shapes))
    return found


def _latency(engine: Engine, inputs: Mapping[str, Array]) -> Callable[[], float]:
    return lambda: seconds(lambda: engine.run(inputs))


def _image_request(settings: Settings) -> ImageRequest:
    return ImageRequest(PROMPT, width=settings.width, height=settings.height, steps=settings.steps, seed=0)


def _diffusion_probes(model: LoadedModel, settings: Settings) -> list[Probe]:
    asked = {name: value for name in ("width", "height", "steps") if (value := getattr(settings, name)) is not None}
    return [
        Probe(
            "picture",
            "s",
            lambda: seconds(lambda: list(drive(model.pipeline(_image_request(settings)), model.engines))),
            asked,
        )
    ]


def _picture_question() -> ChatRequest:
    picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    return ChatRequest((Message("user", (picture, QUESTION)),), max_tokens=1)


class Clock:
    """Engines that note when each call begins."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.begun: list[tuple[str, float]] = []

    def __getitem__(self, submodel: str, /) -> Engine:
        self.begun.append((submodel, time.perf_counter()))
        return self._engines[submodel]


def _chat_probes(model: LoadedModel, settings: Settings) -> list[Probe]:
    pipeline = _endless(model)
    text, prompt_tokens = _text(pipeline, settings.prompt_tokens)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": settings.new_tokens}

    def request(max_tokens: int) -> ChatRequest:
        return ChatRequest((Message("user", (text,)),), max_tokens=max_tokens, temperature=0.0)

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
        asked = _picture_question()
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
