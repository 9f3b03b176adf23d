"""How fast a quantized model is beside the same model without quantization: on the same targets, and in PyTorch.

All of them carry out one request in turns (A B C A B C) in one run, after one turn that does not count, and every call
of an engine is timed. So a submodel is timed at the sizes that a request gives it; what is done between the calls
counts for the whole request alone.
"""

from __future__ import annotations

import copy
import ctypes
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from calibration.ground import machine
from calibration.ground.progress import reached
from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import Array
from runtime.language.text import Message
from runtime.pipeline import Call, Outputs, Pipeline, run_call
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.devices import processor
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.timing import Spread, seconds, turns

PROMPT: Final = "a large red circle at the top left on a white background"
QUESTION: Final = "describe the picture."
EDGE: Final = 128
"""Edge in pixels of the picture that is asked about; every model resizes it to its own."""
REST: Final = 0.02
"""Seconds before each turn: threads of the engine before it wait busily for more work for some milliseconds."""
WHOLE: Final = "request"
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
HEAP: Final = 32 << 20

"""Hears what is being done, and that it is number n (from 1) of m."""


class Kind(NamedTuple):
    """Calls alike: a submodel and what is asked of it. `tokens` is how many of them a language model reads or makes in
    such a call.
    """

    submodel: str
    what: str
    tokens: int = 0


class Measured(Frozen):
    """Figures that are numbers. What a bundle from anywhere holds instead is refused; what other versions add is left
    out.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Timed(Measured):
    """How long one of those compared takes, in seconds. `quant` is "none" before quantization."""

    target: str
    quant: str
    device: str
    spread: Spread


class Timing(Measured):
    """One thing that was timed, a `Kind` of calls or, as submodel `WHOLE`, the request. `calls` is how many of it a
    request makes.
    """

    submodel: str
    what: str
    tokens: int = Field(ge=0)
    calls: int = Field(ge=0)
    times: tuple[Timed, ...] = Field(min_length=1)

    def of(self, target: str, quant: str) -> Timed | None:
        """The time of one of those compared, if it is among them."""
        return next((timed for timed in self.times if (timed.target, timed.quant) == (target, quant)), None)


class Speed(Measured):
    """Everything timed in one run. `others` is the share of the processors' time that other programs had meanwhile,
    None where unknown.

    `left_out` says what could not be timed, and why.
    """

    cpu: str
    threads: int = Field(ge=1)
    others: float | None = Field(default=None, ge=0, le=1)
    versions: Mapping[str, str]
    timings: tuple[Timing, ...]
    left_out: tuple[str, ...] = ()

    @property
    def main(self) -> Timing:
        """What tells most: the kind of call that takes the largest part of a request."""
        calls = [timing for timing in self.timings if timing.submodel != WHOLE and timing.calls] or list(self.timings)
        return max(calls, key=lambda timing: timing.calls * timing.times[0].spread.median)


@dataclass(frozen=True)
class SpeedEffort:
    """How much is timed: `turns` that count, fewer once `seconds` have passed, and the request.

    That has `steps` of a picture (None is as many as the model's users get) or new `tokens` of an answer.
    """

    turns: int = 9
    seconds: float = 4
    steps: int | None = 4
    tokens: int = 16


THOROUGH: Final = SpeedEffort(turns=15, seconds=120, steps=None, tokens=64)


def measure_speed(
    models: Sequence[LoadedModel],
    threads: int,
    effort: SpeedEffort | None = None,
    left_out: Sequence[str] = (),
) -> Speed:
    """Time models of one checkpoint beside each other, all loaded with so many threads. Raises EngineError when one of
    them cannot run.
    """
    effort = effort or SpeedEffort()
    _keep_freed_memory()
    counts: dict[Kind, int] = {}

    def turn(model: LoadedModel) -> Callable[[], dict[Kind, float]]:
        def run() -> dict[Kind, float]:
            time.sleep(REST)
            spent = carry_out(model, effort)
            counts.update({kind: len(times) for kind, times in spent.items()})
            uncalled = _uncalled(model, spent)
            return {kind: sum(times) / len(times) for kind, times in spent.items()} | uncalled

        return run

    others = machine.Others()
    every = effort.turns + 1

    def done(number: int) -> None:
        reached((number + 1) / every, f"turn {number + 1} of {every}")

    found = turns([turn(model) for model in models], effort.turns, done, effort.seconds)
    timings = [
        Timing(
            **kind._asdict(),
            calls=counts.get(kind, 0),
            times=tuple(
                Timed(
                    target=model.target,
                    quant=model.bundle.manifest.quant,
                    device=model.device,
                    spread=Spread.of([values[kind] for values in every]),
                )
                for model, every in zip(models, found, strict=True)
            ),
        )
        for kind in found[0][0]
    ]
    return Speed(
        cpu=processor(),
        threads=threads,
        others=others.share(),
        versions=machine.versions("torch", "diffusers", "transformers"),
        timings=tuple(sorted(timings, key=lambda timing: timing.submodel == WHOLE)),
        left_out=tuple(left_out),
    )


def _keep_freed_memory() -> None:
    """From now on, let glibc keep what is freed as it does by itself in any process that runs for long (mallopt(3)).

    A build has large blocks returned at once, to stay small. Every array would then be made of new pages, which no
    server does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, HEAP)
        mallopt(M_TRIM_THRESHOLD, 2 * HEAP)


def carry_out(model: LoadedModel, effort: SpeedEffort) -> dict[Kind, list[float]]:
    """Carry out the request: seconds of every call, calls alike together, and of the whole. Raises EngineError when a
    call fails.
    """
    spent: dict[Kind, list[float]] = defaultdict(list)
    begin = time.perf_counter()
    pipeline, what = _request(model, effort)
    outputs: Outputs | None = None
    try:
        while True:
            item = pipeline.send(outputs)
            outputs = None
            if isinstance(item, Call):
                start = time.perf_counter()
                outputs = run_call(model.engines, item)
                spent[_kind(item)].append(time.perf_counter() - start)
    except StopIteration:
        spent[Kind(WHOLE, what)].append(time.perf_counter() - begin)
        return dict(spent)


def _request(model: LoadedModel, effort: SpeedEffort) -> tuple[Pipeline, str]:
    """A pipeline that is about to answer, and what it was asked for."""
    if not isinstance(model.pipeline, ChatPipeline):
        asked = ImageRequest(PROMPT, steps=effort.steps, seed=0)
        return model.pipeline(asked), f"picture, {effort.steps or 'its usual'} steps"
    endless = copy.copy(model.pipeline)  # no token ends the answer: all have the same number of them
    endless.config = endless.config.model_copy(update={"eos_token_ids": ()})
    picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    content = (picture, QUESTION) if endless.config.has_vision else (QUESTION,)
    request = ChatRequest((Message("user", content),), max_tokens=effort.tokens, temperature=0.0)
    return endless(request), f"answer, {effort.tokens} tokens"


def _kind(call: Call) -> Kind:
    if call.slot is None:
        return Kind(call.submodel, _shapes(call.inputs))
    length = next(iter(call.inputs.values())).shape[1]
    return Kind(call.submodel, "next token" if length == 1 else f"prompt of {length} tokens", length)


def _shapes(inputs: Mapping[str, Array]) -> str:
    return ", ".join("x".join(map(str, array.shape)) for array in inputs.values())


def _uncalled(model: LoadedModel, spent: Iterable[Kind]) -> dict[Kind, float]:
    """Seconds of one call of each submodel that the request does not need, on a sample of its usual size."""
    called, found = {kind.submodel for kind in spent}, {}
    for submodel in model.bundle.manifest.submodels:
        if submodel.name not in called and not submodel.signature.states:
            usual = {dim.name: dim.opt for dim in submodel.signature.dims.values()} | {"batch": 1}
            inputs = submodel.signature.sample(usual)
            found[Kind(submodel.name, _shapes(inputs))] = seconds(partial(model.engines[submodel.name].run, inputs))
    return found
