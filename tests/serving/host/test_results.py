"""Places in the queue, priorities, and requests that go on without their client, over real loopback gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import enginecast
from runtime import limits
from runtime.errors import Cancelled, InvalidInput, NotFound, ResourceExhausted
from runtime.pipeline import Pipeline
from runtime.tasks.image import ImageRequest
from serving.enginecast_pb import chat_pb2, common_pb2, image_pb2
from serving.host.job import Queued
from serving.host.offers import Limits
from tests.fakes.serving import FakeServer, request, until

FINISH = common_pb2.Terms(on_disconnect=common_pb2.ON_DISCONNECT_FINISH)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path, Limits(slots=1, max_queue=8), ready=True) as server:
        yield server


def collected(server: FakeServer, id: str) -> list[image_pb2.GenerateResponse]:
    message = image_pb2.GenerateRequest(terms=common_pb2.Terms(collect=id))
    return list(server.client.generate(message, timeout=10))


def test_those_who_wait_hear_of_their_new_places(server: FakeServer) -> None:
    list(server.client.generate(request(steps=1)))
    server.draw.hold()
    streams = [server.client.generate(request(steps=1)) for _ in range(3)]
    assert [next(stream).queued.position for stream in streams] == [0, 1, 2]
    server.draw.let(1)
    until(lambda: server.busy() == 2)
    server.draw.release()
    last = [response.queued for response in streams[2] if response.HasField("queued")]
    assert [queued.position for queued in last] in ([1], [1, 0])
    assert all(queued.HasField("eta_seconds") for queued in last if queued.position), "one request was run before"


def test_the_queue_is_left_by_priority_and_then_in_order(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    started, draw = list[int](), server.draw._draw

    def recorded(steps: int, request: ImageRequest) -> Pipeline:
        started.append(request.seed or 0)
        yield from draw(steps, request)

    monkeypatch.setattr(server.draw, "_draw", recorded)
    server.draw.hold()
    kinds = [common_pb2.PRIORITY_NORMAL, common_pb2.PRIORITY_BACKGROUND, 0, common_pb2.PRIORITY_URGENT]
    streams = []
    for number, kind in enumerate(kinds):
        message = request(steps=1, seed=number, terms=common_pb2.Terms(priority=kind))
        streams.append(server.client.generate(message))
        next(streams[-1])
    server.draw.release()
    for stream in streams:
        list(stream)
    assert started == [0, 3, 2, 1]


def test_a_request_goes_on_without_its_client_and_is_collected_once(server: FakeServer) -> None:
    server.draw.hold()
    stream = server.client.generate(request(steps=3, seed=7, terms=FINISH))
    id = next(stream).queued.id
    server.draw.entered.acquire()
    stream.close()
    server.draw.release()
    until(lambda: server.busy() == 0)
    found = collected(server, id)
    assert found[0].queued.id == id and [one.image.seed for one in found if one.HasField("image")] == [7]
    assert sum(one.HasField("progress") for one in found) == 3 and found[-1].HasField("done")
    with pytest.raises(NotFound, match="it was read"):
        collected(server, id)


def test_a_result_is_read_while_it_is_made(server: FakeServer) -> None:
    server.draw.hold()
    stream = server.client.generate(request(steps=2, terms=FINISH))
    id = next(stream).queued.id
    with enginecast.Client(server.address, "draw") as client:
        follower = client.collect_drawing(id)
        assert isinstance(next(iter(follower)), Queued)
        server.draw.release()
        assert len(follower.result().images) == 1
    assert list(stream)[-1].HasField("done"), "the client that stayed reads on"


def test_a_client_that_does_not_let_it_finish_stops_it(server: FakeServer) -> None:
    server.draw.hold()
    stream = server.client.generate(request(steps=5))
    id = next(stream).queued.id
    server.draw.entered.acquire()
    stream.close()
    until(server.leaving)
    server.draw.release()
    until(lambda: server.busy() == 0)
    assert server.draw.calls == 1
    with pytest.raises(NotFound):
        collected(server, id)


def test_a_request_is_stopped_by_its_id_and_no_other(server: FakeServer) -> None:
    server.draw.hold()
    first, second = (server.client.generate(request(steps=2)) for _ in range(2))
    ids = [next(stream).queued.id for stream in (first, second)]
    with enginecast.Client(server.address, "draw") as client:
        client.stop(ids[1])
        with pytest.raises(Cancelled, match="by its id"):
            list(second)
        server.draw.release()
        assert list(first)[-1].HasField("done")
        with pytest.raises(NotFound, match="it has ended"):
            client.stop(ids[0])


def test_results_are_bounded(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIMITS", [])
    monkeypatch.setattr(limits, "RESULT_BYTES", limits.Limit("results", 400, "bytes", "a test"))
    ids = []
    for _ in range(2):  # a picture of the fake model has 384 bytes
        server.draw.hold()
        stream = server.client.generate(request(steps=1, terms=FINISH))
        ids.append(next(stream).queued.id)
        stream.close()
        server.draw.release()
        until(lambda: server.busy() == 0)
    with pytest.raises(NotFound):
        collected(server, ids[0])
    assert collected(server, ids[1])[-1].HasField("done")
    monkeypatch.setattr(limits, "RESULT_BYTES", limits.Limit("results", 100, "bytes", "a test"))
    with pytest.raises(ResourceExhausted, match="collect them"):
        list(server.client.generate(request(steps=1, terms=FINISH)))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"terms": common_pb2.Terms(priority=9)}, "terms.priority"),  # type: ignore[arg-type]
        ({"terms": common_pb2.Terms(on_disconnect=9)}, "terms.on_disconnect"),  # type: ignore[arg-type]
        ({"terms": common_pb2.Terms(collect="x")}, "terms.collect"),
        ({"prompt": "", "terms": common_pb2.Terms(collect="x", priority=2)}, "terms.collect"),
        ({"terms": common_pb2.Terms(keep_alive_seconds=-2)}, "keep_alive_seconds"),
    ],
)
def test_wrong_terms(server: FakeServer, fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        list(server.client.generate(request(**fields), timeout=10))
    assert caught.value.field.endswith(field)


def test_a_result_belongs_to_its_service(server: FakeServer) -> None:
    server.draw.hold()
    stream = server.client.generate(request(steps=1, terms=FINISH))
    message = chat_pb2.ChatRequest(terms=common_pb2.Terms(collect=next(stream).queued.id))
    with pytest.raises(NotFound):
        list(server.client.chat(message, timeout=10))
    server.draw.release()
    assert list(stream)[-1].HasField("done")


def test_a_wrong_priority_of_the_python_client() -> None:
    with pytest.raises(InvalidInput, match=r"priority: is 'urgnt'.*urgent"):
        enginecast.Client("127.0.0.1:1", "draw", priority="urgnt")
