"""What the ingress does with the answers of replicas that fail or are lost, with handles in place of Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("ray")
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from runtime.errors import EnginecastError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from serving.cluster.view import BOARD, TRIES, View
from serving.cluster.wire import Call, Failure, Overview, Part
from serving.host.states import ModelState, Status

CALL = Call("image", b"request", 60, "id", "method", "client", "")
QUEUED, STEP, PICTURE = Part(b"queued", True, False), Part(b"step", False, False), Part(b"picture", False, True)
DRAW = Status("draw", ModelState.READY, "int8", "image", "openvino", "CPU", None, 0, 0)
SHAPES = Status("shapes@2", ModelState.UNLOADED, "", "image", None, None, None, 0, 0, is_default=True, on_demand=True)

Answer = Sequence[Part | Failure | Exception]


class Responses:
    def __init__(self, answer: Answer) -> None:
        self._answer, self.cancelled = answer, False

    async def __aiter__(self) -> AsyncIterator[Part | Failure]:
        for item in self._answer:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """Gives the answers one after another."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.options_given = list(answers), list[dict[str, Any]]()
        self.calls = list[Call]()

    def options(self, **options: Any) -> Replicas:
        self.options_given.append(options)
        return self

    def remote(self, call: Call) -> Responses:
        self.calls.append(call)
        self.given = Responses(self.answers.pop(0))
        return self.given


class Board:
    def __init__(self, overview: Overview) -> None:
        self.overview = self
        self._overview = overview

    async def remote(self) -> Overview:
        return self._overview


ALL = Overview(("draw",), True, [DRAW, SHAPES])


def view(replicas: Replicas, overview: Overview = ALL) -> View:
    found = View()

    async def handle(app: str) -> Any:
        return Board(overview) if app == BOARD else replicas

    found._handle = handle  # type: ignore[method-assign]
    return found


async def answered(replicas: Replicas, model: str = "draw", overview: Overview = ALL) -> list[bytes]:
    return [part.message async for part in view(replicas, overview).answers(model, CALL, "key")]


LOST = ActorDiedError()


async def test_a_request_goes_to_another_replica_until_a_part_of_the_result_was_sent() -> None:
    replicas = Replicas([QUEUED, STEP, LOST], [ActorUnavailableError("", None)], [QUEUED, STEP, PICTURE])
    assert await answered(replicas) == [b"queued", b"step", b"step", b"picture"]


async def test_a_request_of_which_a_part_was_answered_ends() -> None:
    replicas = Replicas([QUEUED, PICTURE, LOST], [QUEUED])
    with pytest.raises(Unavailable, match="the replica that answered was lost") as error:
        await answered(replicas)
    assert error.value.retry_seconds
    assert len(replicas.calls) == 1


async def test_a_request_that_loses_every_replica_ends() -> None:
    replicas = Replicas(*[[QUEUED, LOST]] * (TRIES + 1))
    with pytest.raises(Unavailable):
        await answered(replicas)
    assert len(replicas.calls) == TRIES


async def test_the_time_that_a_lost_replica_used_is_not_given_again() -> None:
    replicas = Replicas([LOST], [PICTURE])
    await answered(replicas)
    first, second = (call.timeout or 0 for call in replicas.calls)
    assert 59 < second < first <= 60


async def test_errors_of_a_replica_are_raised_as_they_were() -> None:
    with pytest.raises(InvalidInput) as error:
        await answered(Replicas([QUEUED, Failure.of(InvalidInput("steps", "is 0, expected 1 to 1000"))]))
    assert (error.value.field, str(error.value)) == ("steps", "steps: is 0, expected 1 to 1000")
    busy = Failure.of(ResourceExhausted("full", 2.5))
    with pytest.raises(ResourceExhausted) as full:
        await answered(Replicas([busy]))
    assert full.value.retry_seconds == 2.5


async def test_a_full_queue_says_when_to_try_again() -> None:
    with pytest.raises(ResourceExhausted) as full:
        await answered(Replicas([BackPressureError(num_queued_requests=3, max_queued_requests=3)]))
    assert full.value.retry_seconds


async def test_a_request_that_is_closed_is_cancelled() -> None:
    replicas = Replicas([QUEUED, STEP, PICTURE])
    answers = view(replicas).answers("draw", CALL, "key")
    await anext(answers)
    await answers.aclose()
    assert replicas.given.cancelled


async def test_the_session_is_the_key_or_in_a_repository_the_model() -> None:
    replicas = Replicas([PICTURE], [PICTURE], [PICTURE])
    found = view(replicas)
    for model, key in (("draw", "key"), ("draw", ""), ("shapes", "key")):
        assert [part async for part in found.answers(model, CALL, key)] == [PICTURE]
    assert [options["session_id"] for options in replicas.options_given] == ["key", "", "shapes"]


async def test_a_repository_that_no_replica_reported_is_asked() -> None:
    assert await answered(Replicas([PICTURE]), "new", overview=Overview(("draw",), True, [DRAW])) == [b"picture"]


async def test_unknown_models_are_refused() -> None:
    with pytest.raises(NotFound, match="model 'drow' is not served here: did you mean 'draw'"):
        await answered(Replicas(), "drow")
    with pytest.raises(InvalidInput, match=r"^model: is missing: name one of draw, shapes, shapes@2"):
        await answered(Replicas(), "")


async def test_a_cluster_that_stops_refuses_requests() -> None:
    stopping = replace(ALL, stopping=True)
    with pytest.raises(Unavailable, match="stopping"):
        await answered(Replicas([PICTURE]), overview=stopping)
    found = view(Replicas(), stopping)
    await asyncio.wait_for(found.changed.wait(), 2)
    assert set(found.ready().values()) == {None}


async def test_the_models_of_a_cluster() -> None:
    found = view(Replicas())
    changed = found.changed
    await asyncio.wait_for(changed.wait(), 2)
    assert found.statuses() == [DRAW, SHAPES]
    assert found.status("shapes") is SHAPES
    assert found.ready() == {"draw": "image", "shapes": "image", "shapes@2": "image"}
    with pytest.raises(EnginecastError):
        found.status("drow")
