"""Requests that run while submodels of their model are still being loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle.manifest import Bundle
from runtime.errors import DeadlineExceeded, EnginecastError, EngineError, Unavailable
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageRequest
from serving.dialects.grpc import messages
from serving.dialects.grpc.health import health_of
from serving.host.inference import Inference
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.offers import ENDLESS, Limits, Offer
from serving.host.states import ModelState
from serving.host.terms import Terms
from serving.page.tabs import models
from tests.fakes.beginning import NAMES, Slow
from tests.fakes.serving import FakeModel, bundle


class Host:
    """A host of one such model, "a", and a request to it."""

    def __init__(self, folder: Path) -> None:
        self.model = Slow()
        offer = Offer.of(bundle(folder, "a").root, keep_alive=ENDLESS)
        self.host = ModelHost([offer], self._load, Limits(slots=4, grace_seconds=5))

    def _load(self, opened: Bundle, target: str | None) -> FakeModel:
        return self.model

    async def draw(self, timeout: float | None = 10, terms: Terms | None = None) -> list[Event]:
        return [event async for event in self.host.run("a", ImageRequest("a circle"), timeout, terms=terms)]

    def state(self) -> ModelState:
        return self.host.status("a").state


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def run(host: Host, work: Callable[[], Coroutine[Any, Any, None]], free: bool = True) -> None:
    """Run a test and close the host, which frees all engines."""

    async def whole() -> None:
        try:
            await work()
        finally:
            assert await host.host.close(1) is free
            host.model.open()
        await until(lambda: host.model.closed)

    asyncio.run(whole())


def test_a_request_is_begun_while_later_submodels_are_loaded(tmp_path: Path) -> None:
    host = Host(tmp_path)
    model = host.model

    async def work() -> None:
        first = asyncio.create_task(host.draw())
        await until(lambda: host.host.status("a").coming == NAMES)
        model.open("text_encoder")
        await until(lambda: model.done("text_encoder") == 1)
        status = host.host.status("a")
        assert (status.state, status.coming, status.device) == (ModelState.LOADING, NAMES[1:], None)
        assert [one.submodel for one in status.placements] == ["text_encoder"] and status.running == 1
        message = messages.model(status)
        assert message.loading_submodels == ["denoiser", "decoder"] and not message.HasField("target")
        assert "a: takes requests while it still loads denoiser, decoder" in models.table([message])
        assert not health_of(host.host)[""] and host.host.ready() == {"a": None}, "not all that it does can be done"
        second = asyncio.create_task(host.draw())
        await until(lambda: model.done("text_encoder") == 2)  # the first request holds up nobody
        model.open("denoiser")
        await until(lambda: model.done("denoiser") == 2)
        assert host.state() is ModelState.LOADING and not first.done()
        model.open("decoder")
        for events in await asyncio.gather(first, second):
            assert isinstance(events[-1], Done) and events[-1].notes == ("all is there",)
            assert [use.submodel for use in events[-1].engines] == list(NAMES)
        await until(lambda: host.state() is ModelState.READY)
        assert host.host.status("a").coming == () and host.host.status("a").device == "none"
        assert health_of(host.host)[""]

    run(host, work)


def test_whoever_waits_gets_the_error_of_a_submodel(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.open("text_encoder")
    error = EngineError(f"could not compile {tmp_path}/a/onnx/denoiser/model.onnx")

    async def work() -> None:
        waiting = [asyncio.create_task(host.draw()) for _ in range(3)]
        loading = asyncio.create_task(host.host.load("a"))
        await until(lambda: host.model.done("text_encoder") == 3)
        host.model.wrong = error
        host.model.open()
        found = await asyncio.gather(*waiting, loading, return_exceptions=True)
        assert [type(one) for one in found] == [EngineError] * 3 + [Unavailable]
        assert {str(one) for one in found[:3]} == {"could not compile a/onnx/denoiser/model.onnx"}
        await until(lambda: host.state() is ModelState.FAILED)
        assert host.host.status("a").error == "could not compile a/onnx/denoiser/model.onnx"
        assert host.model.closed and host.model.made["text_encoder"].closed
        assert host.host.status("a").running == host.host.status("a").queued == 0
        with pytest.raises(Unavailable, match="a is failed: could not compile"):
            await host.draw()

    run(host, work)


def test_an_unexpected_error_does_not_hang_a_request(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.wrong = RuntimeError("a bug")

    async def work() -> None:
        waiting = asyncio.create_task(host.draw())
        await until(lambda: host.host.status("a").running == 1)
        host.model.open()
        with pytest.raises(EngineError, match=r"^a could not be loaded: a bug$"):
            await waiting

    run(host, work)


def test_engines_that_cannot_be_freed_leave_a_model_that_failed(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.wrong = EngineError("could not compile")
    close = host.model.close

    def closing() -> None:
        close()
        raise RuntimeError("the device is lost")

    host.model.close = closing  # type: ignore[method-assign]

    async def work() -> None:
        waiting = asyncio.create_task(host.draw())
        await until(lambda: host.host.status("a").running == 1)
        host.model.open()
        with pytest.raises(EngineError, match="could not compile"):
            await waiting
        await until(lambda: not host.host.catalog.find("a").changes)
        assert (host.state(), host.host.status("a").error) == (ModelState.FAILED, "could not compile")

    run(host, work)


def test_a_request_that_ends_before_all_is_loaded_says_how_long_the_model_stays(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.needed = NAMES[:2]
    host.model.open(*NAMES[:2])

    async def work() -> None:
        assert isinstance((await host.draw(terms=Terms(keep_alive=0)))[-1], Done)
        assert host.state() is ModelState.LOADING
        host.model.open()
        await until(lambda: host.state() is ModelState.UNLOADED)

    run(host, work)


def test_a_call_of_a_submodel_that_is_not_there_ends_its_request_alone(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.needed = ("text_encoder", "upscaler")
    host.model.open("text_encoder")

    async def work() -> None:
        with pytest.raises(KeyError, match="upscaler"):
            await host.draw()
        host.model.open()
        await until(lambda: host.state() is ModelState.READY)
        with pytest.raises(KeyError, match="upscaler"):
            await host.draw()
        host.model.needed = NAMES
        assert isinstance((await host.draw())[-1], Done)

    run(host, work)


def test_loading_by_hand_and_calls_of_submodels_wait_for_all(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.open("text_encoder")

    async def work() -> None:
        loading = asyncio.create_task(host.host.load("a"))
        await until(lambda: "text_encoder" in host.model.made)
        call = host.host.run("a", Inference("text_encoder", {}), 10)
        calling = asyncio.create_task(anext(call))
        with pytest.raises(Unavailable, match="a is loading"):
            host.host.engines("a")
        with pytest.raises(Unavailable, match="a is loading"):
            await host.host.unload("a")
        await asyncio.sleep(0.02)
        assert not loading.done() and not calling.done() and host.model.done("text_encoder") == 0
        host.host.catalog.find("a").withheld = False
        host.model.open()
        await loading
        await calling
        await call.aclose()
        assert host.state() is ModelState.READY

    run(host, work)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_request_that_waits_for_a_submodel_can_end(tmp_path: Path, how: str) -> None:
    host = Host(tmp_path)
    host.model.open("text_encoder")

    async def work() -> None:
        if how == "deadline":
            with pytest.raises(DeadlineExceeded, match=r"was not done after 0\.2 s"):
                await host.draw(0.2)
        else:
            async with aclosing(host.host.run("a", ImageRequest("a circle"), 10)) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        break
        assert host.model.done("text_encoder") == 1
        await until(lambda: host.host.status("a").running == host.host.status("a").queued == 0)
        assert host.state() is ModelState.LOADING, "it is loaded to its end"
        host.model.open()
        await until(lambda: host.state() is ModelState.READY)
        assert isinstance((await host.draw())[-1], Done)

    run(host, work)


def test_the_server_stops_while_a_submodel_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.host.lifecycle.IDLE_SECONDS", 0.1)
    host = Host(tmp_path)
    host.model.open("text_encoder")
    errors: list[EnginecastError] = []

    async def work() -> None:
        async def draw() -> None:
            try:
                await host.draw()
            except EnginecastError as error:
                errors.append(error)

        drawing = asyncio.create_task(draw())
        await until(lambda: host.model.done("text_encoder") == 1)
        assert not await host.host.close(0.1)
        await drawing
        assert [str(error) for error in errors] == [
            "the server is stopping and the request did not finish within 0.1 s: send it again later"
        ]

    run(host, work, free=False)


def test_a_request_may_end_in_the_time_that_the_server_gives(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.model.open("text_encoder")

    async def work() -> None:
        drawing = asyncio.create_task(host.draw())
        await until(lambda: host.model.done("text_encoder") == 1)
        closing = asyncio.create_task(host.host.close(5))
        await asyncio.sleep(0.02)
        host.model.open()
        assert isinstance((await drawing)[-1], Done)
        assert await closing and host.model.closed

    run(host, work)
