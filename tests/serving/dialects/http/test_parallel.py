"""Many streams at once, of which a third is left in the middle: nothing is lost, mixed up or left running."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import pytest

from serving.host.observing import Observer, Record
from serving.host.offers import Limits
from tests.fakes.serving import FakeServer, until
from tests.fakes.web import serve

STREAMS = 64
ASK = {"model": "talk", "messages": [{"role": "user", "content": "what is it?"}], "stream": True}
PATHS = ("/api/chat", "/v1/chat/completions")
ANSWER = "a red círcle"


class Codes(Observer):
    """How the calls of dialects ended."""

    def __init__(self) -> None:
        self.found = Counter[str]()

    def ended(self, record: Record) -> None:
        if record.method.startswith(("ollama/", "openai/")):
            self.found[record.code] += 1


CODES = Codes()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[FakeServer, int]]:
    with FakeServer(tmp_path, Limits(slots=8, max_queue=STREAMS), ready=True, observers=[CODES]) as fake:
        server = serve(fake)
        yield fake, server.port
        fake.do(server.stop())


def text(path: str, lines: bytes) -> str:
    """The answer in a stream."""
    if path == PATHS[0]:
        return "".join(json.loads(line)["message"]["content"] for line in lines.splitlines())
    events = [line.removeprefix("data: ") for line in lines.decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return "".join(choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"])


def test_a_third_leaves(served: tuple[FakeServer, int]) -> None:
    fake, port = served
    fake.models["talk"].hold()
    early = Barrier(STREAMS // 6 + 1)

    def stream(number: int) -> str | None:
        path = PATHS[number % 2]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", path, json.dumps(ASK), {"content-type": "application/json"})
        if number % 6 == 5:  # leaves before anything came
            early.wait(30)
            connection.close()
            return None
        with closing(connection), connection.getresponse() as response:
            assert response.status == 200
            if number % 6 == 2:  # leaves in the middle
                response.read1(10)
                return None
            return text(path, response.read())

    with ThreadPoolExecutor(STREAMS) as threads:
        answers = [threads.submit(stream, number) for number in range(STREAMS)]
        until(lambda: fake.busy("talk") == STREAMS)
        early.wait(30)
        fake.models["talk"].release()
        found = [answer.result() for answer in answers]
    assert found == [None if number % 3 == 2 else ANSWER for number in range(STREAMS)]
    until(lambda: fake.busy("talk") == 0 and CODES.found.total() == STREAMS)
    assert CODES.found.keys() <= {"OK", "CANCELLED"} and CODES.found["CANCELLED"] >= STREAMS // 6
    assert stream(0) == ANSWER, "the server is as right as before"
