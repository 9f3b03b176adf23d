"""What `Model` and `Client` have in common: blocking, streaming and asyncio, and how each is stopped."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from enginecast import (
    Cancelled,
    Client,
    DeadlineExceeded,
    Done,
    Finished,
    ImageReady,
    InvalidInput,
    Message,
    NotFound,
    Progress,
    Session,
    Stream,
    TextDelta,
    Unavailable,
)
from enginecast.testing import FakeModel, fake_model
from tests.fakes.serving import FakeServer, until

Fake = tuple[Session, FakeModel]
GREY = np.full((8, 16, 3), 127, np.uint8)


async def _awaited(stream: Stream[Any]) -> Any:
    return await stream


def test_blocking_pictures(drawing: Fake, tmp_path: Path) -> None:
    session, fake = drawing
    drawn = session.generate("a circle", steps=3, seed=7, images=2, negative_prompt=None)
    assert [image.seed for image in drawn.images] == [7, 8] and fake.calls == 3
    np.testing.assert_array_equal(drawn.image, GREY)
    assert drawn.done.engines[0].target == "fake" and drawn.done.engines[0].calls == 3
    assert drawn.save(tmp_path / "x.png") == [tmp_path / "x-0.png", tmp_path / "x-1.png"]
    with Image.open(tmp_path / "x-1.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), GREY)
        assert picture.info["parameters"] == "a circle\nSteps: 3, Seed: 8, Size: 16x8"
    replace(drawn, request=None).save(tmp_path / "y.png")
    with Image.open(tmp_path / "y-0.png") as picture:
        assert picture.info == {}


def test_streaming_pictures(drawing: Fake) -> None:
    session, _ = drawing
    with session.generate_stream("a circle", steps=2, preview_every=2) as stream:
        events = list(stream)
        drawn = stream.result()
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(one.step, one.total) for one in progress] == [(1, 2), (2, 2)] and progress[0].preview is None
    np.testing.assert_array_equal(progress[1].preview, GREY)
    assert isinstance(events[-2], ImageReady) and isinstance(events[-1], Done) and len(drawn.images) == 1


async def test_asyncio_pictures(drawing: Fake) -> None:
    session, _ = drawing
    assert len((await session.generate_stream("a circle", images=2)).images) == 2
    async with session.generate_stream("a circle", steps=2) as stream:
        steps = [event.step async for event in stream if isinstance(event, Progress)]
        assert (steps, len((await stream).images)) == ([1, 2], 1)


def test_blocking_answers(talking: Fake) -> None:
    session, _ = talking
    answer = session.chat("what?", [GREY])
    assert (str(answer), answer.reason, answer.prompt_tokens, answer.completion_tokens) == (
        "a red círcle",
        "stop",
        7,
        3,
    )
    assert session.chat("what?", max_tokens=2).reason == "length"


def test_streaming_answers(talking: Fake) -> None:
    events = list(talking[0].chat_stream("what?"))
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["a ", "red ", "círcle"]
    assert isinstance(events[-2], Finished) and isinstance(events[-1], Done)


async def test_asyncio_answers(talking: Fake) -> None:
    session, _ = talking
    answers = await asyncio.gather(*(_awaited(session.chat_stream("what?")) for _ in range(3)))
    assert [answer.text for answer in answers] == ["a red círcle"] * 3


def test_pictures_of_every_kind(talking: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, fake = talking
    seen: list[Any] = []
    chat = fake.pipeline
    monkeypatch.setattr(fake, "pipeline", lambda request: (seen.append(request), chat(request))[1])
    file = tmp_path / "p.png"
    Image.fromarray(GREY).save(file)
    pictures = [GREY, file, file.read_bytes(), Image.open(file)]
    said = [Message("user", [*pictures, "what?"]), Message("assistant", "a circle"), Message("user", "sure?")]
    session.chat(said, stop=["."], seed=3)
    (request,) = seen
    assert [turn.role for turn in request.messages] == ["user", "assistant", "user"] and request.stop == (".",)
    for image in request.images:
        np.testing.assert_array_equal(image if isinstance(image, np.ndarray) else image.decode(), GREY)


@pytest.mark.parametrize(
    ("options", "field"), [({"steps": 0}, "steps"), ({"images": 65}, "images"), ({"stepz": 1}, "stepz")]
)
def test_mistakes_are_raised_before_any_work(drawing: Fake, options: Any, field: str) -> None:
    session, fake = drawing
    with pytest.raises(InvalidInput) as caught:
        session.generate_stream("a circle", **options)
    assert caught.value.field == field and fake.calls == 0


def test_mistakes_in_pictures(talking: Fake, tmp_path: Path) -> None:
    session, _ = talking
    with pytest.raises(NotFound, match=r"nowhere\.png cannot be read"):
        session.chat("what?", [tmp_path / "nowhere.png"])
    with pytest.raises(InvalidInput, match=r"images\[0\]: is a str, expected"):
        session.chat("what?", ["fox.png"])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=r"messages\[0\]\.content\[1\]"):
        session.chat([Message("user", ["what?", b"no picture"])])
    with pytest.raises(InvalidInput, match="images"):
        session.chat([Message("user", "what?")], [GREY])


def test_the_wrong_method(way: str, talking: Fake) -> None:
    with pytest.raises(InvalidInput, match=r"has the task chat"):
        talking[0].generate("a circle")


def test_closing_a_stream_stops_the_work(drawing: Fake, server: FakeServer) -> None:
    session, fake = drawing
    fake.hold()
    fake.let(2)
    with session.generate_stream("a circle", steps=100) as stream:
        next(event for event in stream if isinstance(event, Progress))
    until(server.leaving)
    fake.release()
    assert session.generate("a circle", steps=1).images, "the next request is answered"
    assert fake.calls <= 4
    with pytest.raises(Cancelled):
        stream.result()


def test_cancelling_from_another_thread(drawing: Fake, server: FakeServer) -> None:
    session, fake = drawing
    fake.hold()
    stream = session.generate_stream("a circle", steps=100)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            stream.result()
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: fake.calls == 1)
    stream.cancel()
    until(server.leaving)
    fake.release()
    thread.join(10)
    assert len(raised) == 1 and fake.calls == 1


async def test_cancelling_a_task_stops_the_work(drawing: Fake, server: FakeServer) -> None:
    session, fake = drawing
    fake.hold()
    task = asyncio.create_task(_awaited(session.generate_stream("a circle", steps=100)))
    await asyncio.to_thread(until, lambda: fake.calls == 1)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.to_thread(until, server.leaving)
    fake.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fake.calls == 1
    assert (await session.generate_stream("a circle", steps=1)).images


async def test_leaving_an_async_block_stops_the_work(drawing: Fake, server: FakeServer) -> None:
    session, fake = drawing
    fake.hold()
    fake.let(1)
    async with session.generate_stream("a circle", steps=100) as stream:
        async for event in stream:
            if isinstance(event, Progress):
                break
    await asyncio.to_thread(until, server.leaving)
    fake.release()
    assert [event async for event in stream] == [] and fake.calls <= 2


async def test_errors_arrive_under_asyncio(drawing: Fake) -> None:
    session, fake = drawing
    fake.failure = NotFound("it is gone")
    with pytest.raises(NotFound, match="it is gone"):
        await session.generate_stream("a circle")


def test_streams_of_one_model_take_turns() -> None:
    with fake_model() as model:
        first, second = (model.generate_stream("a circle", steps=3) for _ in range(2))
        assert [type(event) for pair in zip(first, second, strict=True) for event in pair].count(Done) == 2
        assert model.target == "fake" and model.task == "image" and model.device == "none" and model.notes == ()


def test_closing_a_model_ends_its_streams() -> None:
    fake = FakeModel()
    model = fake_model(fake)
    stream = model.generate_stream("a circle")
    next(stream)
    model.close()
    model.close()
    with pytest.raises(Unavailable, match="closed"):
        stream.result()
    assert fake.closed


def test_what_a_client_can_besides(server: FakeServer) -> None:
    with Client(server.address, "talk") as client:
        assert [model.name for model in client.models()] == ["draw", "talk"]
        assert client.unload(0).name == "talk" and client.load().name == "talk"
    with Client(server.address, "drow") as client, pytest.raises(NotFound, match="did you mean 'draw'"):
        client.generate("a circle")
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match="no server answers there"):
        client.models()


def test_a_timeout(server: FakeServer) -> None:
    server.draw.hold()
    with Client(server.address, "draw", timeout=0.2) as client, pytest.raises(DeadlineExceeded):
        client.generate("a circle")
    server.draw.release()
