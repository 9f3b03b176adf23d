"""A request on its way: what its reader sees."""

from __future__ import annotations

from enginecast.testing import FakeAnswers
from runtime.tasks.chat import TextDelta
from serving.host.job import Job, Queued, Started
from serving.host.run import Reservation, Run


async def test_a_place_that_comes_behind_the_start_is_left_out() -> None:
    """The event loop tells places while the thread of the model may start a request."""
    pipeline = FakeAnswers().pipeline(None)
    run = Run(Job(FakeAnswers(), pipeline), Reservation("me", 0), lambda run: None)
    for event in (Queued(1), Queued(0), Started(), Queued(0), TextDelta("a"), Queued(0)):
        run.events.put(event)
    run.events.end()
    events = []
    while (event := await run.event()) is not None:
        events.append(event)
    assert events == [Queued(1), Queued(0), Started(), TextDelta("a")]
