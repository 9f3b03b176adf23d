"""The steps of a build in order, each with a guess of its seconds on a usual machine."""

from __future__ import annotations

from collections.abc import Iterator

from export.build.state import Build
from export.family import Part
from export.report.progress import ProgressStep


def steps(state: Build) -> list[ProgressStep]:
    """Everything that the build will do."""
    return [
        *reading(state),
        *_learning(state),
        *_writing(state),
        *_judging(state),
        ProgressStep("bundle", "hash", 0.2),
    ]


def reading(state: Build) -> Iterator[ProgressStep]:
    """Checking weights, tracing graphs, comparing them with the library's own model."""
    yield ProgressStep("weights", "check", sum(_gigabytes(state, part) for part in state.parts) / 2)
    for part in state.parts:
        yield ProgressStep(part.name, "trace", 2 + sum(1 for _ in part.module.modules()) * 0.04)
        yield ProgressStep(part.name, "parity", 1 + 6 * _gigabytes(state, part))


def _learning(state: Build) -> Iterator[ProgressStep]:
    """What captured calls show of each part, and the search."""
    calibrated = [part for part in state.parts if state.calibrated(part)]
    if calibrated:
        yield ProgressStep("pipeline", "calibrate", state.capturing())
    for part in calibrated:
        yield ProgressStep(part.name, "tune", 1 + 100 * _gigabytes(state, part))
        if state.compensated(part):
            yield ProgressStep(part.name, "compensate", 1 + 300 * _gigabytes(state, part))
    if state.options.quant == "auto":
        for part in state.parts:
            yield ProgressStep(part.name, "explore", 30)
        yield ProgressStep("pipeline", "search", 200)


def _writing(state: Build) -> Iterator[ProgressStep]:
    """Quantizing, writing and compiling."""
    pace = 3 if state.options.quant == "none" else 15
    for part in state.parts:
        yield ProgressStep(part.name, "write", 0.2 + pace * _gigabytes(state, part))
    for name in state.options.targets:
        for part in state.parts:
            yield ProgressStep(part.name, f"compile {name}", 0.5 + 5 * _gigabytes(state, part))


def _judging(state: Build) -> Iterator[ProgressStep]:
    """Comparing what was compiled with the graphs, and the whole model with the float one."""
    for name in state.options.targets if state.checked else ():
        for part in state.parts:
            yield ProgressStep(part.name, f"check {name}", 1 + 20 * _gigabytes(state, part))
    if state.measured:
        yield ProgressStep("pipeline", "quality", 20)
    if state.timed:
        yield ProgressStep("pipeline", "speed", 10)


def _gigabytes(state: Build, part: Part) -> float:
    return state.size(part) / 1e9
