"""A driver for many pipelines in lockstep: their calls to the same submodel run as one batch, those of a decoder's
sequences as one run (`Engine.run_many`).
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.engine import SlotCall
from runtime.pipeline import Call, Engines, Event, Outputs, Pipeline, prepare, run_call
from runtime.stacking import Rows


def drive_together(pipelines: Sequence[Pipeline], engines: Engines) -> list[list[Event]]:
    """The events of each of several pipelines, run in lockstep. Calls to the same submodel are stacked where they
    differ in their rows only, and joined where each has a slot.
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
        group = [number for number, call in waiting.items() if _stackable(engines, call, first)]
        for number, outputs in zip(
            group, _run_stacked(engines, [waiting.pop(number) for number in group]), strict=True
        ):
            advance(number, outputs)
    return events


def _stackable(engines: Engines, call: Call, other: Call) -> bool:
    if call is other:
        return True
    if call.submodel != other.submodel or (call.slot is None) != (other.slot is None):
        return False
    if call.slot is not None:
        return True
    rows = Rows.of(engines[call.submodel].submodel.signature)
    return rows is not None and rows.stackable(call.inputs, other.inputs)


def _run_stacked(engines: Engines, calls: Sequence[Call]) -> list[Outputs]:
    if len(calls) == 1:
        return [run_call(engines, calls[0])]
    engine, inputs = engines[calls[0].submodel], [call.inputs for call in calls]
    if calls[0].slot is not None:
        for call in calls:
            prepare(engine, call)
        return list(engine.run_many([SlotCall(call.inputs, call.slot, call.last) for call in calls]))
    rows = Rows.of(engine.submodel.signature)
    assert rows is not None, "calls without rows are not stackable"
    return rows.unstack(engine.run(rows.stack(inputs)), inputs)
