"""Driving a pipeline: calls go to engines, events to the caller, and closing stops the work."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from runtime.bundle.signature import Array
from runtime.engine import FakeEngine, Slot
from runtime.errors import EngineError
from runtime.pipeline import Call, Outputs, Pipeline, Progress, answer, drive, tap
from runtime.tasks.chat import Finished, TextDelta


def double(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": inputs["x"] * 2}  # type: ignore[operator]


class Recorder(FakeEngine):
    """Remembers which slots were used and trimmed, in order."""

    def __init__(self) -> None:
        super().__init__(double)
        self.log: list[tuple[str, Slot | None, int]] = []

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        self.log.append(("run", slot, int(inputs["x"])))
        return super().run(inputs, slot)

    def trim(self, slot: Slot, length: int) -> None:
        self.log.append(("trim", slot, length))


def doubling(times: int, closed: list[str]) -> Pipeline:
    """Doubles 1 repeatedly and reports each result."""
    value: Array = np.array(1)
    try:
        for step in range(1, times + 1):
            outputs = yield Call("double", {"x": value})
            assert outputs is not None
            value = outputs["y"]
            got = yield Progress(step, times)
            assert got is None, "nothing is sent back for an event"
        yield TextDelta(str(value))
        yield Finished("stop", 0, times)
    finally:
        closed.append("closed")


def test_calls_run_and_events_come_out() -> None:
    engine, closed = FakeEngine(double), list[str]()
    events = list(drive(doubling(5, closed), {"double": engine}))
    assert events == [*(Progress(i, 5) for i in range(1, 6)), TextDelta("32"), Finished("stop", 0, 5)]
    assert [int(call["x"]) for call in engine.calls] == [1, 2, 4, 8, 16]
    assert closed == ["closed"]


def test_closing_ends_the_work_at_once() -> None:
    engine, closed = FakeEngine(double), list[str]()
    events = drive(doubling(1000, closed), {"double": engine})
    assert next(events) == Progress(1, 1000)
    events.close()
    assert len(engine.calls) == 1 and closed == ["closed"]


def test_an_engine_that_fails_closes_the_pipeline() -> None:
    def fail(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise EngineError("out of order")

    closed = list[str]()
    with pytest.raises(EngineError, match="out of order"):
        list(drive(doubling(2, closed), {"double": FakeEngine(fail)}))
    assert closed == ["closed"]


def test_slots_are_trimmed_before_the_call() -> None:
    slot = Slot()

    def pipeline() -> Pipeline:
        yield Call("double", {"x": np.array(1)}, slot)
        yield Call("double", {"x": np.array(2)}, slot, keep=7)
        yield Call("double", {"x": np.array(3)}, slot, keep=0)
        yield Call("double", {"x": np.array(4)}, keep=3)

    engine = Recorder()
    assert list(drive(pipeline(), {"double": engine})) == []
    assert engine.log == [
        ("run", slot, 1),
        ("trim", slot, 7),
        ("run", slot, 2),
        ("trim", slot, 0),
        ("run", slot, 3),
        ("run", None, 4),
    ]


def test_a_tap_sees_calls_and_may_change_their_outputs() -> None:
    closed: list[str] = []

    def pipeline() -> Pipeline:
        try:
            first = yield Call("double", {"x": np.ones(1)})
            yield Progress(step=1, total=1)
            assert first is not None
            yield Call("double", first)
        finally:
            closed.append("closed")

    seen: list[tuple[float, float]] = []

    def look(call: Call, outputs: Outputs) -> Outputs:
        seen.append((float(call.inputs["x"][0]), float(outputs["x"][0])))  # type: ignore[arg-type]
        return {"x": outputs["x"] + 1}  # type: ignore[operator]

    engine = FakeEngine(lambda inputs: {"x": inputs["x"] * 2})  # type: ignore[operator]
    assert [type(event) for event in drive(tap(pipeline(), look), {"double": engine})] == [Progress]
    assert seen == [(1, 2), (3, 6)] and closed == ["closed"]
    unfinished = tap(pipeline(), look)
    next(unfinished)
    unfinished.close()
    assert closed == ["closed", "closed"], "closing the tap closes the pipeline"


def test_calls_can_be_answered_without_engines() -> None:
    def pipeline() -> Pipeline:
        outputs = yield Call("any", {})
        yield Progress(step=int((outputs or {})["x"]), total=2)

    (event,) = answer(pipeline(), lambda call: {"x": np.array(2)})
    assert event == Progress(step=2, total=2)
