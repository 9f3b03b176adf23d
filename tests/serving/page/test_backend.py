"""Where a page's requests go, and that each page stops its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from runtime.errors import Cancelled, InvalidInput, NotFound
from runtime.language.logprobs import TokenLogprob
from runtime.pipeline import Event, Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.enginecast_pb import model_pb2
from serving.host.job import Done, Queued
from serving.page import lines
from serving.page.backend import Backend, Local, Remote, Visitor
from serving.page.runs import Runs
from tests.fakes.serving import FakeServer, until

DRAW = ImageRequest("a circle", steps=3, seed=5)
ME = Visitor("page")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path / "bundles", ready=True) as server:
        yield server


@pytest.fixture
async def remote(fake: FakeServer) -> AsyncIterator[Backend]:
    backend = Remote(fake.address)
    yield backend
    await backend.close()


async def drawn(backend: Backend) -> list[Event]:
    return [event async for event in backend.run("draw", DRAW, ME)]


async def test_the_events_are_the_same_here_and_elsewhere(fake: FakeServer, remote: Backend) -> None:
    elsewhere = await drawn(remote)
    here = await asyncio.to_thread(lambda: fake.do(drawn(Local(fake.host))))
    kinds = (Queued, Progress, ImageReady, Done)
    assert [type(one) for one in elsewhere] == [type(one) for one in here if isinstance(one, kinds)]
    (picture,) = (one for one in elsewhere if isinstance(one, ImageReady))
    assert picture.seed == 5


async def test_models_elsewhere_are_loaded_and_unloaded(fake: FakeServer, remote: Backend) -> None:
    await remote.unload("draw", ME)
    states = {model.name: model.state for model in await remote.models(ME)}
    assert states == {"draw": model_pb2.MODEL_STATE_UNLOADED, "talk": model_pb2.MODEL_STATE_READY}
    await remote.load("draw", ME)
    assert fake.host.status("draw").state.value == "ready"
    with pytest.raises(NotFound):
        await remote.load("none", ME)


async def test_a_page_stops_its_own_requests_alone(fake: FakeServer, remote: Backend) -> None:
    runs, seen = Runs(remote), dict[str, list[Event]]()
    fake.draw.hold()

    async def follow(session: str) -> None:
        async with aclosing(runs.events(Visitor(session), "draw", "draw", DRAW)) as events:
            async for event in events:
                seen.setdefault(session, []).append(event)

    one, other = (asyncio.create_task(follow(session)) for session in ("one", "other"))
    await asyncio.to_thread(until, lambda: fake.busy() == 2)
    while len(seen) < 2:
        await asyncio.sleep(0.01)
    await runs.stop("one", "talk")
    await runs.stop("none")
    await asyncio.sleep(0.05)
    assert not one.done()
    await runs.stop("one", "draw")
    with pytest.raises(Cancelled):
        await one
    assert not other.done()
    fake.draw.release()
    await other
    assert isinstance(seen["other"][-1], Done)
    await runs.stop("other")


async def test_a_request_that_waits_for_its_model_stops_then(fake: FakeServer, remote: Backend) -> None:
    await remote.unload("draw", ME)
    fake.load_gate.clear()
    runs = Runs(Local(fake.host))

    async def first() -> Event:
        async with aclosing(runs.events(Visitor("one"), "draw", "draw", DRAW)) as events:
            return await anext(events)

    fake.host.catalog.find("draw").withheld = False
    began = asyncio.create_task(asyncio.to_thread(lambda: fake.do(first())))
    await asyncio.to_thread(until, lambda: fake.host.status("draw").state.value == "loading")
    await asyncio.to_thread(lambda: fake.do(runs.stop("one")))
    fake.load_gate.set()
    with pytest.raises(Cancelled):
        await began
    await asyncio.to_thread(until, lambda: fake.busy() == 0)


def test_lines_are_plain_text() -> None:
    assert lines.failed(InvalidInput("guidance_scale", "is <b>")).endswith(">guidance scale: is &lt;b&gt;</p>")
    assert lines.failed(Cancelled("it")) == lines.line("stopped")
    assert "secret" not in lines.failed(RuntimeError("secret"))
    assert "waiting: 2 before this one, about 3 s" in lines.queued(Queued(2, 2.6, "id"))
    assert "starting" in lines.queued(Queued(0))
    token = TokenLogprob(1, b"<a>", math.log(0.5), (TokenLogprob(2, b"b", math.log(0.25)),))
    table = lines.likely([(0, token)] * (lines.TOKENS + 2))
    row = "<tr><td>1</td><td><code>&lt;a&gt;</code></td><td>50.0%</td><td><code>b</code> 25.0%</td></tr>"
    assert table.count(row) == lines.TOKENS
    assert "and 2 more" in table
    assert 'max="4" value="1"' in lines.progress(Progress(1, 4))
