"""A driver for many pipelines in lockstep: their calls to the same submodel run as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from runtime.diffusion.adapters import DOWN, UP
from runtime.pipeline import Call, Engines, Event, Outputs, Pipeline

SHARED: Final = (DOWN, UP)
"""Inputs that all rows of a call have in common."""


def drive_together(pipelines: Sequence[Pipeline], engines: Engines) -> list[list[Event]]:
    """The events of each of several pipelines, run in lockstep. Calls to the same submodel are stacked where their
    shapes are equal, and so is what rows share. No call may have a slot.
    """
    events: list[list[Event]] = [[] for _ in pipelines]
    waiting: dict[int, Call] = {}

    def advance(number: int, outputs: Outputs | None) -> None:
        try:
            item = pipelines[number].send(outputs)
            while not isinstance(item, Call):
                events[number].append(item)
                item = next(pipelines[number])
        except StopIteration:
            return
        waiting[number] = item

    for number in range(len(pipelines)):
        advance(number, None)
    while waiting:
        first = next(iter(waiting.values()))
        group = [number for number, call in waiting.items() if _stackable(call, first)]
        for number, outputs in zip(
            group, _run_stacked(engines, [waiting.pop(number) for number in group]), strict=True
        ):
            advance(number, outputs)
    return events


def _stackable(call: Call, other: Call) -> bool:
    def shapes(of: Call) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in of.inputs.items()}

    alike = call.submodel == other.submodel and shapes(call) == shapes(other)
    return alike and all(
        np.array_equal(call.inputs[name], other.inputs[name]) for name in SHARED if name in call.inputs
    )


def _run_stacked(engines: Engines, calls: Sequence[Call]) -> list[Outputs]:
    assert all(call.slot is None for call in calls), "a slot's states belong to one sequence"
    first = calls[0].inputs
    stacked = {name: np.concatenate([call.inputs[name] for call in calls]) for name in first if name not in SHARED}
    stacked |= {name: first[name] for name in SHARED if name in first}
    outputs = engines[calls[0].submodel].run(stacked)
    parts = {name: np.split(array, len(calls)) for name, array in outputs.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(len(calls))]
