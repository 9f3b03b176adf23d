"""The speed of a quantized model beside the same model without quantization, on the same targets and in PyTorch.

All of them run one request in turns (A B C A B C) in one process, after a warm-up turn, and every engine call is timed.
So a submodel is timed at the sizes of a real request. Time between the calls counts for the whole request only.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from pydantic import Field

from calibration.ground import machine
from calibration.ground.progress import reached
from export.report.measured import Measured
from export.task import SpeedEffort, comparisons
from runtime.bundle.signature import Array
from runtime.pipeline import Call, Outputs, answer, run_call
from runtime.placing.heap import keep_freed_memory
from runtime.placing.loading import LoadedModel
from runtime.placing.processor import processor
from runtime.timing import Spread, seconds, turns

REST: Final = 0.02
"""Seconds of pause before each turn: threads of the previous engine busy-wait for some milliseconds."""
WHOLE: Final = "request"


class CallKind(NamedTuple):
    """Calls of one kind: a submodel and the size of its inputs. `tokens` is how many a language model reads or makes in
    such a call.
    """

    submodel: str
    what: str
    tokens: int = 0


class Timed(Measured):
    """The seconds that one of the compared programs takes. `quant` is "none" without quantization."""

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
        """The time of one of the compared programs, if it was timed."""
        return next((timed for timed in self.times if (timed.target, timed.quant) == (target, quant)), None)


class Speed(Measured):
    """Everything timed in one run. `others` is the share of the processors' time that other programs used meanwhile,
    None where unknown.

    `left_out` lists what could not be timed, with the reasons.
    """

    cpu: str
    threads: int = Field(ge=1)
    others: float | None = Field(default=None, ge=0, le=1)
    versions: Mapping[str, str]
    timings: tuple[Timing, ...]
    left_out: tuple[str, ...] = ()

    @property
    def main(self) -> Timing:
        """The kind of call that takes the largest part of a request."""
        calls = [timing for timing in self.timings if timing.submodel != WHOLE and timing.calls] or list(self.timings)
        return max(calls, key=lambda timing: timing.calls * timing.times[0].spread.median)


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
    keep_freed_memory()
    counts: dict[CallKind, int] = {}

    def turn(model: LoadedModel) -> Callable[[], dict[CallKind, float]]:
        def run() -> dict[CallKind, float]:
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


def carry_out(model: LoadedModel, effort: SpeedEffort) -> dict[CallKind, list[float]]:
    """Carry out the request: seconds of every call, calls alike together, and of the whole. Raises EngineError when a
    call fails.
    """
    spent: dict[CallKind, list[float]] = defaultdict(list)
    begin = time.perf_counter()
    pipeline, what = comparisons()[model.task].timed(model, effort)

    def timed(call: Call) -> Outputs:
        start = time.perf_counter()
        outputs = run_call(model.engines, call)
        spent[_kind(call)].append(time.perf_counter() - start)
        return outputs

    for _ in answer(pipeline, timed):
        pass
    spent[CallKind(WHOLE, what)].append(time.perf_counter() - begin)
    return dict(spent)


def _kind(call: Call) -> CallKind:
    if call.slot is None:
        return CallKind(call.submodel, _shapes(call.inputs))
    length = next(iter(call.inputs.values())).shape[1]
    return CallKind(call.submodel, "next token" if length == 1 else f"prompt of {length} tokens", length)


def _shapes(inputs: Mapping[str, Array]) -> str:
    return ", ".join("x".join(map(str, array.shape)) for array in inputs.values())


def _uncalled(model: LoadedModel, spent: Iterable[CallKind]) -> dict[CallKind, float]:
    """Seconds of one call of each submodel that the request does not need, on a sample of its usual size."""
    called, found = {kind.submodel for kind in spent}, {}
    for submodel in model.bundle.manifest.submodels:
        if submodel.name not in called and not submodel.signature.states:
            usual = {dim.name: dim.opt for dim in submodel.signature.dims.values()} | {"batch": 1}
            inputs = submodel.signature.sample(usual)
            found[CallKind(submodel.name, _shapes(inputs))] = seconds(partial(model.engines[submodel.name].run, inputs))
    return found
