"""Models that are loaded for requests, unloaded for others and replaced, without a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle.manifest import Bundle
from runtime.errors import BundleError, DeadlineExceeded, NotFound, ResourceExhausted, Unavailable
from runtime.pipeline import Event
from runtime.tasks.image import ImageRequest
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.offers import ENDLESS, Limits, Offer
from serving.host.residency import Memory, Needs
from serving.host.states import ModelState
from serving.host.terms import Terms
from tests.fakes.serving import FakeModel, bundle

REQUEST = ImageRequest("a circle", steps=2)
MOST = 100


class Models:
    """A host of fake models that need 60 bytes each, of which only one fits into its memory."""

    def __init__(self, folder: Path, *names: str, keep_alive: float | None = ENDLESS, most: int | None = MOST) -> None:
        self.made: list[FakeModel] = []
        self.targets: list[str | None] = []
        self.gate = threading.Event()
        self.gate.set()
        self.memory_back, self.giving_back = threading.Event(), threading.Event()
        self.memory_back.set()
        self.failure: Exception | None = None
        self.held = False
        offers = [Offer.of(bundle(folder, name).root) for name in names]
        offers = [replace(one, keep_alive=keep_alive) for one in offers]
        memory = Memory(most, lambda *_: Needs({"gpu": 60}), self._give_back)
        self.host = ModelHost(offers, self._load, Limits(grace_seconds=5), memory=memory)

    def _give_back(self) -> None:
        if not self.memory_back.is_set():
            self.giving_back.set()
        assert self.memory_back.wait(10)

    def _load(self, opened: Bundle, target: str | None) -> FakeModel:
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        model = FakeModel()
        if self.held:
            model.hold()
        self.made.append(model)
        self.targets.append(target)
        return model

    async def draw(self, name: str = "a", timeout: float | None = 10, keep_alive: float | None = None) -> Event:
        """Run a request and return its last event."""
        async for event in self.host.run(name, REQUEST, timeout, terms=Terms(keep_alive)):
            last = event
        return last

    def state(self, name: str = "a") -> ModelState:
        return self.host.status(name).state

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


def run(models: Models, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test, and close the host."""

    async def whole() -> None:
        try:
            await work()
        finally:
            for model in models.made:
                model.release()
            models.gate.set()
            assert await models.host.close(1)
        assert all(model.closed for model in models.made)

    asyncio.run(whole())


def test_eight_first_requests_load_once(tmp_path: Path) -> None:
    models = Models(tmp_path, "a")

    async def work() -> None:
        done = await asyncio.gather(*(models.draw() for _ in range(8)))
        assert all(isinstance(one, Done) for one in done) and len(models.made) == 1

    run(models, work)


def test_all_that_wait_get_the_error_of_loading(tmp_path: Path) -> None:
    models = Models(tmp_path, "a")
    models.failure = BundleError(f"{tmp_path}/a/onnx is damaged")

    async def work() -> None:
        errors = await asyncio.gather(*(models.draw() for _ in range(8)), return_exceptions=True)
        assert {(type(error), str(error)) for error in errors} == {(BundleError, "a/onnx is damaged")}
        with pytest.raises(Unavailable, match="a is failed: a/onnx is damaged") as caught:
            await models.draw()
        assert 20 < (caught.value.retry_seconds or 0) <= 30

    run(models, work)


def test_a_model_that_failed_is_loaded_for_requests_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(tmp_path, "a")
    models.failure = BundleError("is damaged")
    monkeypatch.setattr("serving.host.served.RETRY_SECONDS", 0.05)

    async def work() -> None:
        with pytest.raises(BundleError):
            await models.draw()
        models.failure = None
        await asyncio.sleep(0.06)
        assert isinstance(await models.draw(), Done)

    run(models, work)


def test_loading_takes_of_the_time_of_a_request(tmp_path: Path) -> None:
    models = Models(tmp_path, "a")
    models.gate.clear()

    async def work() -> None:
        with pytest.raises(DeadlineExceeded, match=r"a was not loaded after 0\.05 s"):
            await models.draw(timeout=0.05)
        assert models.host.status("a").queued == 0
        models.gate.set()
        await models.until(lambda: models.state() is ModelState.READY)

    run(models, work)


def test_an_idle_model_makes_room(tmp_path: Path) -> None:
    models = Models(tmp_path, "a", "b")

    async def work() -> None:
        await models.draw("a")
        assert models.host.status("a").memory["gpu"] == 60
        await models.draw("b")
        assert models.state("a") is ModelState.UNLOADED and models.made[0].closed
        assert not models.host.status("a").memory
        await models.draw("a")
        assert models.state("b") is ModelState.UNLOADED

    run(models, work)


def test_a_model_that_takes_more_than_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(tmp_path, "a", "b", most=130)
    sizes = iter((60, 90))
    monkeypatch.setattr("serving.host.loading.measured", lambda *_: {"gpu": next(sizes)})

    async def work() -> None:
        await models.draw("a")
        assert models.host.status("a").memory == {"gpu": 60}
        await models.draw("b")
        assert models.state("a") is ModelState.UNLOADED, "both were estimated to fit, 60 bytes each"
        assert models.host.status("b").memory == {"gpu": 90}

    run(models, work)


def test_a_busy_model_makes_no_room(tmp_path: Path) -> None:
    models = Models(tmp_path, "a", "b")
    models.held = True

    async def work() -> None:
        drawing = asyncio.create_task(models.draw("a"))
        await models.until(lambda: bool(models.made) and models.made[0].calls == 1)
        with pytest.raises(ResourceExhausted, match="b needs 60 B of gpu memory, and 60 B of the 100 B"):
            await models.draw("b")
        assert models.state("b") is ModelState.UNLOADED and not models.made[0].closed
        models.made[0].release()
        models.held = False
        assert isinstance(await drawing, Done)
        assert isinstance(await models.draw("b"), Done)

    run(models, work)


def test_a_request_that_arrives_at_an_eviction_is_answered(tmp_path: Path) -> None:
    """Requests for three models with room for one: each is loaded and unloaded while others arrive."""
    models = Models(tmp_path, "a", "b", "c")

    async def persist(name: str) -> None:
        while True:
            try:
                assert isinstance(await models.draw(name), Done)
            except ResourceExhausted:  # the others are in use
                await asyncio.sleep(0.002)
            else:
                return

    async def work() -> None:
        await asyncio.gather(*(persist(name) for name in "abc" * 8))
        held = [name for name in "abc" if models.state(name) is ModelState.READY]
        assert len(held) == 1 and sum(not model.closed for model in models.made) == 1

    run(models, work)


def test_a_request_during_an_eviction_loads_it_again(tmp_path: Path) -> None:
    models = Models(tmp_path, "a", keep_alive=0)

    async def work() -> None:
        for _ in range(5):
            await models.draw()
            await models.until(lambda: models.state() is not ModelState.READY)
            assert isinstance(await models.draw(), Done)

    run(models, work)


@pytest.mark.parametrize("turns", range(6))
def test_a_request_that_comes_when_the_keep_alive_ends(tmp_path: Path, turns: int) -> None:
    models = Models(tmp_path, "a", keep_alive=0)

    async def later() -> Event:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await models.draw()

    async def work() -> None:
        await models.draw()
        assert isinstance(await asyncio.create_task(later()), Done)

    run(models, work)


def test_keep_alive_of_a_request(tmp_path: Path) -> None:
    models = Models(tmp_path, "a", keep_alive=300)

    async def work() -> None:
        await models.draw()
        status = models.host.status("a")
        assert 290 < (status.unload_seconds or 0) <= 300 and (status.idle_seconds or 0) < 10
        await models.draw(keep_alive=0)
        await models.until(lambda: models.state() is ModelState.UNLOADED)
        assert models.host.status("a").on_demand

    run(models, work)


def test_unloading_at_the_end_of_a_load(tmp_path: Path) -> None:
    models = Models(tmp_path, "a")

    async def work() -> None:
        models.gate.clear()
        loading = asyncio.create_task(models.host.load("a"))
        waiting = asyncio.create_task(models.draw())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="is loading"):
            await models.host.unload("a")
        models.gate.set()
        await loading
        assert isinstance(await waiting, Done)
        await models.host.unload("a")
        with pytest.raises(Unavailable, match="is unloaded"):
            await models.draw()

    run(models, work)


def test_stopping_ends_those_that_wait_for_a_load(tmp_path: Path) -> None:
    models = Models(tmp_path, "a")

    async def work() -> None:
        models.gate.clear()
        waiting = [asyncio.create_task(models.draw()) for _ in range(2)]
        await models.until(lambda: models.state() is ModelState.LOADING)
        closing = asyncio.create_task(models.host.close(1))
        with pytest.raises(Unavailable, match="stopping"):
            await waiting[1]
        models.gate.set()
        await asyncio.gather(waiting[0], closing, return_exceptions=True)

    run(models, work)


class TestReload:
    def test_requests_move_over_and_those_that_run_finish(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a", most=None)
        models.held = True

        async def work() -> None:
            drawing = asyncio.create_task(models.draw())
            await models.until(lambda: bool(models.made) and models.made[0].calls == 1)
            models.held = False
            await models.host.reload("a")
            assert isinstance(await models.draw(), Done) and models.made[1].calls == 2
            assert not models.made[0].closed
            models.made[0].release()
            assert isinstance(await drawing, Done) and models.made[0].calls == 2
            await models.until(lambda: models.made[0].closed)
            assert models.state() is ModelState.READY

        run(models, work)

    def test_the_old_one_serves_on_if_the_new_one_fails(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a", most=None)

        async def work() -> None:
            await models.draw()
            models.failure = BundleError("is damaged")
            with pytest.raises(BundleError, match="is damaged"):
                await models.host.reload("a")
            status = models.host.status("a")
            assert status.state is ModelState.READY and "goes on: is damaged" in (status.error or "")
            assert isinstance(await models.draw(), Done) and not models.made[0].closed
            models.failure = None
            await models.host.reload("a")
            assert models.host.status("a").error is None

        run(models, work)

    def test_it_stays_on_its_target(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a", most=None)

        async def work() -> None:
            await models.host.load("a", "openvino")
            await models.host.reload("a")
            await models.host.reload("a")
            assert models.targets == ["openvino"] * 3

        run(models, work)

    def test_without_memory_for_both(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a")

        async def work() -> None:
            await models.draw()
            with pytest.raises(ResourceExhausted, match="held by a,"):
                await models.host.reload("a")
            assert isinstance(await models.draw(), Done) and len(models.made) == 1

        run(models, work)

    def test_another_bundle_in_the_folder(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a", most=None)

        async def work() -> None:
            await models.draw()
            file = tmp_path / "a" / "manifest.json"
            file.write_text(file.read_text().replace('"quant":"none"', '"quant":"int8"'))
            await models.host.reload("a")
            assert models.host.status("a").quant == "int8"
            file.write_text("no manifest")
            with pytest.raises(BundleError):
                await models.host.reload("a")
            assert models.host.status("a").quant == "int8"

        run(models, work)

    def test_one_change_at_a_time(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a", most=None)

        async def work() -> None:
            await models.draw()
            models.gate.clear()
            reloading = asyncio.create_task(models.host.reload("a"))
            await models.until(lambda: models.host.status("a").reloading)
            for change in (models.host.reload, models.host.unload):
                with pytest.raises(Unavailable, match="a is being reloaded"):
                    await change("a")
            assert isinstance(await models.draw(), Done), "it serves meanwhile"
            models.gate.set()
            await reloading

        run(models, work)

    def test_stopping_meanwhile(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a", most=None)

        async def work() -> None:
            await models.draw()
            models.gate.clear()
            reloading = asyncio.create_task(models.host.reload("a"))
            await models.until(lambda: models.host.status("a").reloading)
            assert not await models.host.close(0.1), "a thread still loads"
            assert models.made[0].closed
            models.gate.set()
            with pytest.raises(Unavailable, match="stopping"):
                await reloading

        run(models, work)

    def test_stopping_before_its_thread_begins(self, tmp_path: Path) -> None:
        """What comes before, such as giving memory back, may take longer than the server waits."""
        models = Models(tmp_path, "a", most=None)

        async def work() -> None:
            await models.draw()
            models.memory_back.clear()
            reloading = asyncio.create_task(models.host.reload("a"))
            await models.until(models.giving_back.is_set)
            assert not await models.host.close(0)
            models.memory_back.set()
            with pytest.raises(Unavailable, match="stopping"):
                await reloading
            assert len(models.made) == 1, "nothing is loaded for a server that stops"

        run(models, work)

    def test_a_name_that_is_not_served(self, tmp_path: Path) -> None:
        models = Models(tmp_path, "a")

        async def work() -> None:
            with pytest.raises(NotFound, match="known: a"):
                await models.host.reload("b")

        run(models, work)
