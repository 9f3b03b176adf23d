"""What is measured of models that answer. Exams score their answers.

first_token  seconds until the first token about a picture
follow_up    seconds until the first token of the next turn about it
prefill      prompt tokens a second
decode       new tokens a second
"""

from __future__ import annotations

import bisect
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import Field

from calibration.ground import machine
from calibration.requests.exams import Case
from calibration.requests.tasks.chat import TASK as REQUESTS
from profiles.asked import ANSWER, EDGE, QUESTION
from profiles.exam import ExamSettings, Subject, batches
from profiles.probes import Probe, seconds
from profiles.task import ProfileTask, Rate, Requests, Suite, TaskExam
from profiles.together import drive_together
from runtime.bundle.manifest import Bundle, Frozen
from runtime.bundle.signature import nbytes
from runtime.engine import Engine
from runtime.errors import BundleError, InvalidInput
from runtime.language.text import Message
from runtime.limits import PICTURE_TOKENS
from runtime.optional import require
from runtime.pipeline import Engines, Event, Room, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel, open_pipeline
from runtime.tasks.chat import ChatRequest, Finished
from runtime.vision.images import Picture, decoded

HELD: Final = 1 << 40
"""Bytes that may be held of earlier turns: all."""


class AnswerSettings(Frozen):
    """The measured answer: the lengths in tokens of a text prompt and of the answer to it."""

    prompt_tokens: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=64, ge=2)
    pictures: bool = False
    """Whether each request to a server is about a picture of its own."""
    picture_tokens: int = Field(default=0, ge=0, le=PICTURE_TOKENS.most)
    """Positions of each picture, 0 is all."""


def picture_question(model: LoadedModel, settings: AnswerSettings) -> ChatRequest:
    return ChatRequest(
        (Message("user", (_picture(0), QUESTION)),), max_tokens=1, temperature=0.0, beams=1,
        picture_tokens=settings.picture_tokens,
    )  # fmt: skip


class Clock:
    """Engines that record when each call begins."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.begun: list[tuple[str, float]] = []

    def __getitem__(self, submodel: str, /) -> Engine:
        self.begun.append((submodel, time.perf_counter()))
        return self._engines[submodel]


def chat_probes(model: LoadedModel, settings: AnswerSettings) -> list[Probe]:
    pipeline = _endless(model)
    text, prompt_tokens = _text(pipeline, settings.prompt_tokens)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": settings.new_tokens}

    def request(max_tokens: int) -> ChatRequest:
        return ChatRequest((Message("user", (text,)),), max_tokens=max_tokens, temperature=0.0, beams=1)

    def answer(request: ChatRequest) -> None:
        list(drive(pipeline(request), model.engines))

    def decode() -> float:
        clock = Clock(model.engines)
        list(drive(pipeline(request(settings.new_tokens)), clock))
        chosen = [begun for submodel, begun in clock.begun if submodel == "token_embedding"][
            1:
        ]  # the first embeds the prompt
        return len(chosen) / (time.perf_counter() - chosen[0])

    pipeline(request(settings.new_tokens)).close()  # refused now where the context is too short
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
        about_picture = picture_question(model, settings)
        length = {"prompt_tokens": len(pipeline.prompt(about_picture).ids), **_pruned(settings.picture_tokens)}
        found.insert(0, Probe("first_token", "s", lambda: seconds(lambda: answer(about_picture)), length))
        found.insert(1, Probe("follow_up", "s", follow_up(model, settings), length))
    return found


def follow_up(model: LoadedModel, settings: AnswerSettings) -> Callable[[], float]:
    """Seconds to the first token of a second turn about a picture, whose first turn is held."""
    pipeline = _endless(model)
    pipeline.vision = copy.copy(pipeline.vision)  # what is held of pictures is not the model's
    first = picture_question(model, settings)
    turns = (*first.messages, Message("assistant", (ANSWER,)), Message("user", (QUESTION,)))
    second = replace(first, messages=turns)

    def run() -> float:
        pipeline.remember(Room(HELD, HELD, 1))
        list(drive(pipeline(first), model.engines))
        return seconds(lambda: list(drive(pipeline(second), model.engines)))

    return run


def decoded_together(model: LoadedModel, settings: AnswerSettings, count: int) -> Rate:
    """Tokens that so many sequences get in a second, from the first step of all of them on."""
    pipeline = _endless(model)
    text, prompt_tokens = _text(pipeline, settings.prompt_tokens)
    messages = (Message("user", (text,)),)
    request = ChatRequest(messages, max_tokens=settings.new_tokens, temperature=0.0, beams=1)

    def run() -> float:
        clock = Clock(model.engines)
        drive_together([pipeline(request) for _ in range(count)], clock)
        steps = [begun for submodel, begun in clock.begun if submodel == "decoder"][-(settings.new_tokens - 1) :]
        return count * len(steps) / (time.perf_counter() - steps[0])

    return Rate("tokens/s", run, {"prompt_tokens": prompt_tokens, "new_tokens": settings.new_tokens})


def chat_load(bundle: Bundle, settings: AnswerSettings) -> Requests:
    """Questions that differ from their first word on. Answers end where the model ends them: a server's client cannot
    have them at a fixed length.
    """
    pipeline = open_pipeline(bundle)
    if not isinstance(pipeline, ChatPipeline):
        raise BundleError(f"bundle {bundle.name} has the pipeline {bundle.manifest.pipeline}, which cannot be measured")
    text, prompt_tokens = _text(pipeline, settings.prompt_tokens)

    def request(number: int) -> ChatRequest:
        words = f"{number} {text}"
        content = (_picture(number), words) if settings.pictures else (words,)
        return ChatRequest(
            (Message("user", content),), max_tokens=settings.new_tokens, temperature=0.0, beams=1,
            picture_tokens=settings.picture_tokens,
        )  # fmt: skip

    pipeline(request(0)).close()  # refused now where the context is too short
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": settings.new_tokens, "pictures": int(settings.pictures)}
    return Requests(request, _tokens, "tokens/s", sizes | _pruned(settings.picture_tokens))


def _pruned(picture_tokens: int) -> dict[str, int]:
    """Among the settings of a row: the positions of each picture, where it has not all."""
    return {"picture_tokens": picture_tokens} if picture_tokens else {}


def _tokens(event: Event) -> float:
    return event.completion_tokens if isinstance(event, Finished) else 0


def _picture(number: int) -> Picture:
    return np.random.default_rng(number).integers(0, 256, (EDGE, EDGE, 3), np.uint8)


def _endless(model: LoadedModel) -> ChatPipeline:
    """The model's pipeline, but no token ends an answer: a fixed number of tokens is comparable, and random weights
    never stop anyway.
    """
    if not isinstance(model.pipeline, ChatPipeline):
        raise BundleError(
            f"bundle {model.bundle.name} has the pipeline {model.bundle.manifest.pipeline}, which cannot be measured: "
            "its answers cannot be made to a fixed length"
        )
    pipeline = copy.copy(model.pipeline)
    pipeline.config = pipeline.config.model_copy(update={"eos_token_ids": ()})
    return pipeline


def _text(pipeline: ChatPipeline, tokens: int) -> tuple[str, int]:
    """A text whose prompt, template included, is the longest of at most so many tokens, and that length."""

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
    """Bytes that a decoding step reads: all weights of the decoder, and its cache."""
    decoder = model.bundle.submodel("decoder")
    lengths = decoder.signature.decoder.lengths(past, 0)
    states = nbytes((state.past for state in decoder.signature.states), lengths)
    return float(decoder.nbytes + states)


class AnswerExam(ExamSettings):
    """Positions of each picture besides; None is all."""

    picture_tokens: int | None = Field(default=None, ge=1, le=PICTURE_TOKENS.most)


def exam_settings(source: Path | None, bundles: Sequence[Path], count: int, options: Mapping[str, Any]) -> AnswerExam:
    if source is not None and "picture_tokens" in options:
        raise InvalidInput("picture-tokens", "is of bundles, other libraries read all positions: leave --source out")
    return AnswerExam(count=count, **options)


def answers(model: LoadedModel, cases: Sequence[Case], setting: AnswerExam) -> Iterator[Any]:
    for case in cases:
        request = replace(case.request, picture_tokens=setting.picture_tokens or 0)
        yield REQUESTS.result(drive(model.pipeline(request), model.engines))


def is_source(folder: Path) -> bool:
    """Whether the folder holds a model of transformers, and no pipeline of diffusers."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def source_subject(folder: Path, additions: Mapping[str, Mapping[str, Path]]) -> Subject:
    """A model of transformers with its own processor. Nothing can be added to one."""
    torch, transformers = require("torch", "export"), require("transformers", "export")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # answers begin at the same place

    def turn(message: Message) -> dict[str, Any]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.content]
        return {"role": message.role, "content": content}

    def prompt(request: ChatRequest) -> str:
        if processor.chat_template is None:
            return " ".join(part for message in request.messages for part in message.content if isinstance(part, str))
        turns = [turn(message) for message in request.messages]
        return str(processor.apply_chat_template(turns, add_generation_prompt=True))

    def answered(cases: Sequence[Case], setting: ExamSettings) -> Iterator[Any]:
        for some in batches([case.request for case in cases], setting.batch):
            inputs = processor(
                images=[decoded(picture) for request in some for picture in request.images],
                text=[prompt(request) for request in some],
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                # BLIP-2 hands its language model no other settings than those of the call
                tokens = model.generate(**inputs, generation_config=model.generation_config, do_sample=False)
            yield from processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    program = f"transformers {machine.version('transformers')}"
    return Subject(program, folder.name, "none", "torch", "cpu", answered)


TASK: Final = ProfileTask(
    ChatRequest.task,
    "answers",
    frozenset({"prompt-tokens", "new-tokens", "pictures", "picture-tokens"}),
    AnswerSettings,
    picture_question,
    chat_probes,
    TaskExam(is_source, source_subject, exam_settings, answers),
    chat_load,
    decoded_together,
    {
        "quick": Suite(
            repeat=3, budget=3, batches=(1, 2, 4), clients=(1, 4), starts=1,
            settings={"prompt_tokens": 256, "new_tokens": 32},
        ),
        "full": Suite(repeat=15, budget=120, batches=(1, 2, 4, 8, 16), clients=(1, 2, 4, 8), starts=3),
    },
    {"prompt_tokens": 64, "new_tokens": 16},
)  # fmt: skip
