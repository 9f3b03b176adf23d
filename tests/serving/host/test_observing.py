"""What a host reports of requests, and the records that it fills in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import EngineError, InvalidInput, NotFound
from runtime.pipeline import Event, Progress
from runtime.tasks.chat import Finished, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from serving.host.job import Done, Queued, Started
from serving.host.models import ModelHost
from serving.host.observing import Counts, Observer, Record, current, recorded
from serving.host.states import ModelState
from tests.fakes.serving import FakeModel, bundle


class Diary(Observer):
    """Keeps all that it is called with."""

    def __init__(self) -> None:
        self.events: list[tuple[str, type[Event]]] = []
        self.records: list[Record] = []
        self.states: list[tuple[str, ModelState]] = []

    def event(self, record: Record, event: Event) -> None:
        self.events.append((record.model, type(event)))

    def ended(self, record: Record) -> None:
        self.records.append(record)

    def changed(self, model: str, state: ModelState) -> None:
        self.states.append((model, state))


def observed(folder: Path, *requests: tuple[str, Any], model: FakeModel | None = None) -> tuple[Diary, ModelHost]:
    """A host that ran these requests, one after the other, and was closed."""
    diary = Diary()
    host = ModelHost([bundle(folder, "draw")], lambda *_: model or FakeModel(), observers=[diary])

    async def run() -> None:
        await host.load("draw")
        for name, request in requests:
            with recorded(Record(method="draws"), host.observer):
                try:
                    async for _ in host.run(name, request):
                        pass
                except (InvalidInput, NotFound, EngineError):
                    current().code = "FAILED"  # type: ignore[union-attr]  # it is open
        await host.close()

    asyncio.run(run())
    return diary, host


def test_a_request_is_reported_event_by_event(tmp_path: Path) -> None:
    diary, _ = observed(tmp_path, ("draw", ImageRequest("a circle", steps=2)))
    kinds = [Queued, Started, Progress, Progress, ImageReady, Done]
    assert diary.events == [("draw", kind) for kind in kinds]


def test_a_record_has_the_times_in_order_and_what_ran(tmp_path: Path) -> None:
    diary, _ = observed(tmp_path, ("draw", ImageRequest("a circle", steps=2)))
    (record,) = diary.records
    assert (record.model, record.task, record.method, record.code) == ("draw", "image", "draws", "OK")
    assert record.counts == {"steps": 2, "pictures": 1}
    times = record.queued, record.started, record.first_output, record.ended
    assert all(time is not None for time in times) and list(times) == sorted(times)  # type: ignore[type-var]
    assert [(use.submodel, use.calls) for use in record.engines] == [("denoiser", 2)]


def test_states_of_a_model_are_reported(tmp_path: Path) -> None:
    states = [ModelState.LOADING, ModelState.READY, ModelState.UNLOADING, ModelState.UNLOADED]
    assert observed(tmp_path)[0].states == [("draw", state) for state in states]


def test_requests_that_fail_are_counted_with_their_model(tmp_path: Path) -> None:
    model = FakeModel()
    model.failure = EngineError("out of memory")
    diary, host = observed(tmp_path, ("draw", ImageRequest("a circle")), ("else", ImageRequest("a")), model=model)
    assert [(record.model, record.queued is not None) for record in diary.records] == [("draw", True), ("", False)]
    counts = dict(host.status("draw").counts)
    assert counts.pop("run_seconds") > 0, "the engine tried"
    assert counts == {"requests": 1, "failed": 1, "runs": 1, "calls": 1}


def test_a_name_of_a_client_becomes_no_model(tmp_path: Path) -> None:
    """What is kept for each model is bounded by the models there are."""
    diary, host = observed(tmp_path, *(("x" * count, ImageRequest("a")) for count in range(1, 5)))
    assert {record.model for record in diary.records} == {""} and set(host.counts._counts) <= {"draw"}


def test_runs_of_engines_are_counted() -> None:
    counts = Counts()
    counts.ran("talk", "decoder", calls=8, seconds=0.5)
    counts.ran("talk", "decoder", calls=2, seconds=0.25)
    assert counts.of("talk") == {"runs": 2, "calls": 10, "run_seconds": 0.75}


def test_records_of_calls_at_once_are_kept_apart(tmp_path: Path) -> None:
    async def call(name: str) -> str:
        with recorded(Record(id=name), Observer()):
            await asyncio.sleep(0.001)
            record = current()
            return record.id if record else ""

    async def calls() -> list[str]:
        return await asyncio.gather(*(call(str(i)) for i in range(20)))

    assert asyncio.run(calls()) == [str(i) for i in range(20)] and current() is None


@pytest.mark.parametrize(
    ("event", "counts"),
    [
        (TextDelta("a", 0, tokens=3), {"output_tokens": 3}),
        (Finished("stop", 7, 3, reused_tokens=2), {"prompt_tokens": 7, "reused_tokens": 2}),
        (Finished("stop", 7, 3, answer=1), {}),
    ],
)
def test_a_prompt_counts_once_for_all_its_answers(event: Event, counts: dict[str, int]) -> None:
    assert event.counts == counts
