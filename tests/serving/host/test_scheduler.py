"""Requests that run together give what each gives alone, and none holds up or spoils another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Signature
from runtime.engine import Engine, FakeEngine, Slot, SlotCall
from runtime.errors import Cancelled, EngineError
from runtime.language.text import Message
from runtime.pipeline import Call, Event, Outputs, Pipeline, Progress
from runtime.placing.loading import LoadedModel, load_model
from runtime.placing.placement import PlacementOptions
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from serving.host import batches
from serving.host.job import Done, Job
from serving.host.run import Reservation, Run
from serving.host.scheduler import Scheduler


@dataclass
class Toys:
    """A model of engines made of functions."""

    engines: Mapping[str, Engine]
    task: str = "image"
    target: str = "fake"
    device: str = "none"
    notes: Sequence[str] = ()
    pipeline: Any = None

    def close(self) -> None: ...
    def broken(self) -> Sequence[str]:
        return ()

    def elsewhere(self, broken: Sequence[str]) -> Toys:
        return self


def fake(compute: Callable[[Mapping[str, Array]], Outputs]) -> FakeEngine:
    engine = FakeEngine(compute)
    engine.submodel = Submodel(
        name="fake",
        signature=Signature(inputs=(), outputs=()),
        graph="model.onnx",
        precision=Precision.parse("float32"),
        nbytes=0,
    )
    return engine


async def read(run: Run) -> list[Event]:
    events = []
    while (event := await run.events.get()) is not None:
        events.append(event)
    return events


def started(scheduler: Scheduler, model: Any, *pipelines: Pipeline, clients: Sequence[str] = ()) -> list[Run]:
    """A request for each pipeline, each of a client of its own unless there are `clients`."""
    names = clients or [str(number) for number in range(len(pipelines))]
    runs = [
        Run(Job(model, pipeline), Reservation(name, 0), scheduler.changed)
        for name, pipeline in zip(names, pipelines, strict=True)
    ]
    for run in runs:
        scheduler.submit(run)
    return runs


def together(model: Any, *pipelines: Pipeline, slots: int = 8) -> list[list[Event]]:
    """The events of pipelines that were started at once."""

    async def run() -> list[list[Event]]:
        scheduler = Scheduler("model", slots)
        try:
            return await asyncio.gather(*map(read, started(scheduler, model, *pipelines)))
        finally:
            scheduler.close()

    return asyncio.run(run())


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def chat(vlm_bundle: Path, request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    model = load_model(vlm_bundle, request.param, placing=PlacementOptions(prefix_cache=64 << 20))
    yield model
    model.close()


def question(words: str, seed: int | None = None) -> ChatRequest:
    return ChatRequest((Message("user", (*(() if seed is None else (square(seed),)), words)),), max_tokens=12)


def square(seed: int) -> Array:
    """A coloured square on grey."""
    rng, picture = np.random.default_rng(seed), np.full((64, 64, 3), 128, np.uint8)
    top, left = rng.integers(4, 36, 2)
    picture[top : top + 24, left : left + 24] = rng.integers(0, 256, 3)
    return picture


QUESTIONS = [
    question("How many shapes are there?", 1),
    question("What colour is the circle? " * 5, 2),
    question("Is there a square?"),
    replace(question("Describe the picture.", 3), picture_tokens=20),
    question("How many shapes are there?", 1),
]


def test_answers_are_those_that_each_gets_alone(chat: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [text(list(Job(chat, chat.pipeline(request)).events())) for request in QUESTIONS]
    rows, run_many = list[int](), type(chat.engines["decoder"]).run_many

    def counted(self: Engine, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        rows.append(len(calls))
        return run_many(self, calls)

    monkeypatch.setattr(type(chat.engines["decoder"]), "run_many", counted)
    monkeypatch.setattr(batches, "CHUNK", 64)
    found = together(chat, *map(chat.pipeline, QUESTIONS))
    assert [text(events) for events in found] == alone and all(alone)
    assert max(rows) == len(QUESTIONS), "all of them wrote their answers in one run"
    assert all(isinstance(events[-1], Done) for events in found)


def test_guesses_are_verified_together_with_the_answers_of_others(
    chat: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets what it gets alone and without guesses, also where only some of them guess."""
    asked = (*QUESTIONS, question("Describe the picture.", 9))
    alone = [text(list(Job(chat, chat.pipeline(request)).events())) for request in asked]
    verified, run_many = list[int](), type(chat.engines["decoder"]).run_many

    def counted(self: Engine, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        verified.append(sum(call.last > 1 for call in calls))
        return run_many(self, calls)

    monkeypatch.setattr(type(chat.engines["decoder"]), "run_many", counted)
    guessed = [
        replace(request, lookup_tokens=count, prediction=said)
        for request, count, said in zip(asked, (4, 2, 0, 4, 1, 3), alone, strict=True)
    ]
    found = together(chat, *map(chat.pipeline, guessed))
    assert [text(events) for events in found] == alone
    ends = [event for events in found for event in events if isinstance(event, Finished)]
    assert ends[3].accepted_tokens > 2 and ends[5].accepted_tokens > 2 and not ends[2].guessed_tokens
    assert max(verified) > 1, "guesses of two requests were verified in one run"


def test_a_further_turn_is_read_from_where_the_last_one_ended(chat: LoadedModel) -> None:
    first = question("How many shapes are there?", 7)
    (before,) = together(chat, chat.pipeline(first))
    further = ChatRequest(
        (*first.messages, Message("assistant", (text(before),)), Message("user", ("What colour is it?",))),
        max_tokens=12,
    )
    (events,) = together(chat, chat.pipeline(further))
    (end,) = (event for event in events if isinstance(event, Finished))
    done = events[-1]
    assert isinstance(done, Done)
    assert end.reused_tokens > 16 and "vision_encoder" not in {use.submodel for use in done.engines}
    fresh = load_model(chat.bundle, chat.target)
    assert text(list(Job(fresh, fresh.pipeline(further)).events())) == text(events)
    fresh.close()


def test_pictures_are_those_that_each_gets_alone(diffusion_bundle: Path) -> None:
    model = load_model(diffusion_bundle, "onnxruntime", placing=PlacementOptions(picture_cache=1 << 20))
    requests = [
        ImageRequest(prompt, steps=3, seed=seed) for prompt, seed in (("a red circle", 1), ("a blue square", 2))
    ]

    def pictures(events: Sequence[Event]) -> list[Any]:
        return [event.image for event in events if isinstance(event, ImageReady)]

    alone = [pictures(list(Job(model, model.pipeline(request)).events())) for request in requests]
    found = together(model, *map(model.pipeline, requests))
    assert all(np.array_equal(*pair) for pair in zip(map(pictures, found), alone, strict=True))
    done = found[0][-1]
    assert isinstance(done, Done)
    assert {use.submodel: (use.calls, use.reused) for use in done.engines}["text_encoder"] == (0, 1)
    model.close()


def walk(name: str, steps: int, seen: list[str]) -> Pipeline:
    for step in range(1, steps + 1):
        yield Call("unet", {})
        seen.append(name)
        yield Progress(step, steps)


def test_clients_take_turns_however_many_requests_they_send() -> None:
    seen = list[str]()

    def compute(inputs: Mapping[str, Array]) -> Outputs:
        time.sleep(0.03)
        return {}

    crowd = [walk("many", 10, seen) for _ in range(4)]

    async def run() -> None:
        scheduler = Scheduler("model", 8)
        runs = started(
            scheduler, Toys({"unet": fake(compute)}), *crowd, walk("one", 10, seen), clients=[*["many"] * 4, "one"]
        )
        await asyncio.gather(*map(read, runs))
        scheduler.close()

    asyncio.run(run())
    last = max(place for place, name in enumerate(seen) if name == "one")
    assert last <= 26, "the one had about every second step"
    assert seen.count("many") == 40


def test_a_fault_ends_its_own_request_only() -> None:
    def compute(inputs: Mapping[str, Array]) -> Outputs:
        if inputs["x"][0] == 3:
            raise EngineError("broken")
        return {"y": inputs["x"] * 2}

    def doubled(number: int) -> Pipeline:
        outputs = yield Call("decoder", {"x": np.array([number])}, Slot())
        assert outputs is not None
        yield TextDelta(str(outputs["y"][0]))

    async def run() -> None:
        scheduler = Scheduler("model", 8)
        runs = started(scheduler, Toys({"decoder": fake(compute)}), *map(doubled, range(5)))
        results = await asyncio.gather(*map(read, runs), return_exceptions=True)
        assert isinstance(results[3], EngineError) and isinstance(runs[3].error, EngineError)
        assert [text(events) for events in results if isinstance(events, list)] == ["0", "2", "4", "8"]
        scheduler.close()

    asyncio.run(run())


def test_a_slot_that_cannot_be_continued_ends_its_own_request_only(
    chat: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [text(list(Job(chat, chat.pipeline(request)).events())) for request in QUESTIONS[:2]]
    lost, trim = Slot(), chat.engines["decoder"].trim

    def refusing(slot: Slot, length: int) -> None:
        if slot is lost:
            raise EngineError("the slot is lost")
        trim(slot, length)

    monkeypatch.setattr(chat.engines["decoder"], "trim", refusing)

    def wrong() -> Pipeline:
        lengths = chat.engines["decoder"].submodel.signature.decoder.lengths(1, 1)
        inputs = chat.engines["decoder"].submodel.signature.sample_call(lengths, np.random.default_rng(0))
        yield Call("decoder", inputs, lost, keep=1)

    async def run() -> None:
        scheduler = Scheduler("model", 8)
        runs = started(scheduler, chat, *map(chat.pipeline, QUESTIONS[:2]), wrong())
        *good, bad = await asyncio.gather(*map(read, runs), return_exceptions=True)
        assert [text(events) for events in good if isinstance(events, list)] == expected
        assert isinstance(bad, EngineError)
        scheduler.close()

    asyncio.run(run())


def test_a_reader_that_does_not_read_holds_up_nobody() -> None:
    picture = np.zeros((2048, 2048, 3), np.uint8)

    def draw() -> Pipeline:
        for index in range(5):
            yield Call("unet", {})
            yield ImageReady(picture, index, 0)

    async def run() -> None:
        scheduler = Scheduler("model", 2)
        slow, quick = started(scheduler, Toys({"unet": fake(lambda inputs: {})}), draw(), draw())
        assert len(await asyncio.wait_for(read(quick), 10)) == 7
        assert not slow.future.done()
        assert len(await asyncio.wait_for(read(slow), 10)) == 7
        scheduler.close()

    asyncio.run(run())


def test_a_stopped_request_ends_before_its_next_call_and_a_waiting_one_at_once() -> None:
    entered, go = threading.Semaphore(0), threading.Semaphore(0)

    def compute(inputs: Mapping[str, Array]) -> Outputs:
        entered.release()
        assert go.acquire(timeout=10)
        return {}

    async def run() -> None:
        scheduler = Scheduler("model", 1)
        engine = fake(compute)
        running, waiting = started(
            scheduler, Toys({"unet": engine}), walk("a", 9, []), walk("a", 9, []), clients=["one", "one"]
        )
        await asyncio.to_thread(entered.acquire)
        for run in (waiting, running):
            run.fail(Cancelled("the caller left"))
        assert waiting.future.done() and not running.future.done()
        between = scheduler.do(lambda: len(engine.calls))
        go.release()
        assert await asyncio.wrap_future(between) == 1
        await asyncio.wait_for(asyncio.wrap_future(running.future), 10)
        assert len(engine.calls) == 1
        scheduler.close()

    asyncio.run(run())


def test_a_fault_of_the_pipeline_ends_its_own_request_only() -> None:
    def wrong() -> Pipeline:
        yield Call("unet", {})
        raise ValueError("a bug")

    events, fault = asyncio.run(both(wrong()))
    assert isinstance(events[-1], Done) and isinstance(fault, ValueError)


def test_a_request_that_comes_beside_work_begins_after_it() -> None:
    async def run() -> None:
        scheduler, busy, go = Scheduler("model", 1), threading.Event(), threading.Event()
        scheduler.do(lambda: (busy.set(), go.wait(10)))
        await asyncio.to_thread(busy.wait, 10)
        (begun,) = started(scheduler, Toys({"unet": fake(lambda inputs: {})}), walk("a", 1, []))
        scheduler.do(lambda: None)
        go.set()
        await asyncio.wait_for(asyncio.wrap_future(begun.future), 10)
        scheduler.close()

    asyncio.run(run())


def test_what_is_asked_for_after_the_end_is_done() -> None:
    """A model may still be loading when its server stops."""
    scheduler = Scheduler("model", 8)
    threads = [scheduler.do(threading.current_thread).result(10)]
    scheduler.close()
    threads[0].join(10)
    threads.append(scheduler.do(threading.current_thread).result(10))
    threads[1].join(10)
    assert threads[0] is not threads[1] and not any(thread.is_alive() for thread in threads)


async def both(wrong: Pipeline) -> tuple[Any, Any]:
    scheduler = Scheduler("model", 8)
    runs = started(scheduler, Toys({"unet": fake(lambda inputs: {})}), walk("a", 3, []), wrong)
    good, bad = await asyncio.gather(*map(read, runs), return_exceptions=True)
    scheduler.close()
    return good, bad
