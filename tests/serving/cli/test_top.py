"""`enginecast top` over a real server, driven by Textual's pilot."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from textual.widgets import DataTable, Static
from typer.testing import CliRunner

from runtime.errors import InvalidInput, Unavailable
from serving.cli import commands as cli
from serving.cli.top import Rates, Sample, Top, row
from serving.enginecast_pb import model_pb2
from tests.fakes.serving import FakeServer, request


def shown(app: Top) -> dict[str, list[str]]:
    """The rows of the table by model."""
    table = app.query_one(DataTable)
    rows = [[str(cell) for cell in table.get_row_at(at)] for at in range(table.row_count)]
    return {cells[0]: cells[1:] for cells in rows}


def head(app: Top) -> str:
    """The line about the server."""
    return str(app.query_one("#server", Static).render())


def watch(app: Top, check: Callable[[Any], Awaitable[None]]) -> None:
    """Run the app without a terminal, and the check in it."""

    async def run() -> None:
        async with app.run_test(size=(160, 20)) as pilot:
            await check(pilot)

    asyncio.run(run())


async def until(pilot: Any, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        await pilot.pause(0.02)
        if condition():
            return
    raise AssertionError("it did not come to be shown")


def test_it_shows_models_at_work(warm: FakeServer) -> None:
    app = Top(warm.address, partial(warm.client.status, 5), 0.1)
    warm.draw.hold()
    streams = [warm.client.generate(request(steps=2)) for _ in range(3)]

    async def check(pilot: Any) -> None:
        await until(pilot, lambda: shown(app).get("draw", [""] * 3)[1:3] == ["1", "2"])
        assert shown(app)["talk"][:3] == ["ready", "0", "0"] and list(shown(app)) == ["draw", "talk"]
        assert warm.address in head(app) and "version " in head(app) and "memory " in head(app)
        warm.draw.release()
        for stream in streams:
            await asyncio.to_thread(list, stream)
        await until(pilot, lambda: shown(app)["draw"][6:8] == ["3", "0"])
        assert float(shown(app)["draw"][4]) > 0, "steps a second"
        await pilot.press("q")

    watch(app, check)


def test_a_server_that_is_gone_is_asked_again(warm: FakeServer) -> None:
    answers = iter([Unavailable("no server answers there"), warm.client.status(5)])

    def look() -> model_pb2.StatusResponse:
        answer = next(answers, None) or warm.client.status(5)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    app = Top("elsewhere:1", look, 0.3)

    async def check(pilot: Any) -> None:
        await until(pilot, lambda: "no server answers" in head(app))
        await until(pilot, lambda: "draw" in shown(app))

    watch(app, check)


def test_an_answer_that_comes_when_the_screen_is_gone(warm: FakeServer) -> None:
    """As when the program was just left."""
    arrived, left = threading.Event(), threading.Event()

    def look() -> model_pb2.StatusResponse:
        arrived.set()
        assert left.wait(10)
        return warm.client.status(5)

    app = Top("there", look, 5)

    async def whole() -> None:
        async with app.run_test() as pilot:
            await until(pilot, arrived.is_set)
        app._show(warm.client.status(5))
        left.set()

    asyncio.run(whole())


def test_what_a_server_says_cannot_control_the_terminal() -> None:
    hostile = model_pb2.Model(name="\x1b[2J[red]x", state=model_pb2.MODEL_STATE_READY)
    app = Top("there", lambda: model_pb2.StatusResponse(version="\x1b]0;x", models=[hostile]), 5)

    async def check(pilot: Any) -> None:
        await until(pilot, lambda: app.query_one(DataTable).row_count == 1)
        assert list(shown(app)) == ["?[2J[red]x"] and "\x1b" not in head(app)

    watch(app, check)


def test_rates_are_per_second_and_never_negative() -> None:
    rates = Rates()
    rates.add(Sample(10, {"output_tokens": 100}))
    assert rates.of("output_tokens") == 0
    rates.add(Sample(12, {"output_tokens": 160}))
    assert rates.of("output_tokens") == 30
    rates.add(Sample(13, {"output_tokens": 5}))
    assert rates.of("output_tokens") == 15, "the server was started again: half of 30, and half of nothing"


def test_a_row_has_the_mean_batch_and_the_memory() -> None:
    counts = {"requests": 3.0, "failed": 1.0, "runs": 4.0, "calls": 10.0}
    model = model_pb2.Model(name="a", state=model_pb2.MODEL_STATE_LOADING, counts=counts, memory_bytes={"cpu": 1 << 30})
    assert row(model, Rates()) == ["a", "loading", "0", "0", "", "", "2.5", "3", "1", "1.0 GiB cpu", ""]


def test_it_needs_a_terminal() -> None:
    ended = CliRunner().invoke(cli.app, ["top"])
    assert isinstance(ended.exception, InvalidInput) and "needs a terminal" in str(ended.exception)
