from __future__ import annotations

import asyncio

import numpy as np
import pytest

from runtime.errors import Cancelled, EngineError
from runtime.pipeline import Event, Progress
from runtime.tasks.chat import TextDelta
from runtime.tasks.image import ImageReady
from serving.host.mailbox import Mailbox
from serving.host.waking import WAKER

PICTURE = np.zeros((2048, 2048, 3), np.uint8)  # 12 MiB


async def rest(mailbox: Mailbox) -> list[Event]:
    events = []
    while (event := await mailbox.get()) is not None:
        events.append(event)
    return events


async def test_events_come_in_order_and_then_the_end() -> None:
    mailbox = Mailbox()
    events = [TextDelta("a"), Progress(1, 2), TextDelta("b")]

    def work() -> None:
        for event in events:
            mailbox.put(event)
        mailbox.end()

    await asyncio.to_thread(work)
    assert await rest(mailbox) == events
    assert await mailbox.get() is None


async def test_older_previews_that_nobody_read_are_left_out_and_no_step_is() -> None:
    mailbox = Mailbox()
    for step in range(1, 101):
        mailbox.put(Progress(step, 100, PICTURE))
    mailbox.end()
    events = await rest(mailbox)
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(1, 101))
    assert [event.step for event in events if isinstance(event, Progress) and event.preview is not None] == [99, 100]


async def test_finished_pictures_wait_to_be_read() -> None:
    asked = list[None]()
    mailbox = Mailbox(lambda: asked.append(None))
    pictures = [ImageReady(PICTURE, index, 0) for index in range(5)]
    taken = [mailbox.put(picture) for picture in pictures]
    assert taken == [True, True, False, False, False], "three of them are more than may be unread"
    assert not asked
    assert await mailbox.get() == pictures[0]
    assert asked, "the worker hears of the room"
    assert mailbox.put(pictures[2])
    mailbox.end()
    assert await rest(mailbox) == pictures[1:3]


async def test_the_end_frees_a_worker_that_waits() -> None:
    asked = list[None]()
    mailbox = Mailbox(lambda: asked.append(None))
    while mailbox.put(ImageReady(PICTURE, 0, 0)):
        pass
    mailbox.end(Cancelled("the reader left"), at_once=True)
    assert asked and mailbox.put(ImageReady(PICTURE, 0, 0)), "what is put after the end is forgotten"
    with pytest.raises(Cancelled):
        await mailbox.get()


async def test_an_error_comes_behind_what_was_put_unless_it_is_for_now() -> None:
    first, second = Mailbox(), Mailbox()
    for mailbox, at_once in ((first, False), (second, True)):
        mailbox.put(TextDelta("a"))
        mailbox.end(EngineError("broken"), at_once)
        mailbox.end()
    assert await first.get() == TextDelta("a")
    for mailbox in (first, second):
        with pytest.raises(EngineError):
            await mailbox.get()


async def test_a_reader_is_woken_once_for_all_that_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wakeup passes from one thread to another, which costs more than an event."""
    mailbox, woken = Mailbox(), list[object]()
    wake = WAKER.wake
    monkeypatch.setattr(WAKER, "wake", lambda reader: (woken.append(reader), wake(reader)))
    first = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    for text in "abc":
        mailbox.put(TextDelta(text))
    assert len(woken) == 1
    mailbox.end()
    assert [await first, *await rest(mailbox)] == [TextDelta(text) for text in "abc"]


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    mailbox = Mailbox()
    first = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    first.cancel()
    mailbox.put(TextDelta("a"))
    second = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put(TextDelta("b"))
    assert await second == TextDelta("a")
    assert await mailbox.get() == TextDelta("b")
    assert first.cancelled()
