"""Measures what HTTP costs beside gRPC: `python -m tests.serving.overhead` prints both, per request and per token.

The model answers with as many words as a request says and computes nothing, so that the time is that of the server and
its client, which have a process each. Requests take turns, one at a time, on connections that stay open.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Final

from runtime.pipeline import Call, Pipeline
from runtime.tasks.chat import Finished, TextDelta
from serving.dialects.grpc.client import Client
from serving.enginecast_pb import chat_pb2
from tests.fakes.serving import FakeAnswers, FakeModel, FakeServer
from tests.fakes.web import serve

FEW, MANY = 1, 401
"""Words of an answer."""
TIMES: Final = {FEW: 200, MANY: 30}
MESSAGE: Final = "What is in the picture?"


class Talker(FakeAnswers):
    """Answers with as many words as a request says."""

    def pipeline(self, request: Any) -> Pipeline:
        count = request.max_tokens or 1
        for _ in range(count):
            yield Call("denoiser", {})
            yield TextDelta("word ", tokens=1)
        yield Finished("length", 7, count)


class TalkingServer(FakeServer):
    """A server with a `Talker`."""

    kinds: ClassVar[Mapping[str, type[FakeModel]]] = {"talk": Talker}


def run_server() -> None:
    """Serve until standard input is closed; the first line says where."""
    with tempfile.TemporaryDirectory() as folder, TalkingServer(Path(folder) / "bundles", ready=True) as fake:
        server = serve(fake)
        print(fake.address, server.port, flush=True)
        sys.stdin.read()
        fake.do(server.stop())


def over_grpc(client: Client, words: int) -> int:
    """Ask over gRPC. Returns the pieces of the answer."""
    part = chat_pb2.Part(text=MESSAGE)
    message = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=[part])
    responses = client.chat(chat_pb2.ChatRequest(model="talk", messages=[message], max_tokens=words))
    return sum(response.HasField("delta") for response in responses)


def over_http(connection: http.client.HTTPConnection, words: int) -> int:
    """Ask as clients of Ollama do. Returns the pieces of the answer."""
    options = {"num_predict": words}
    body = {"model": "talk", "messages": [{"role": "user", "content": MESSAGE}], "options": options}
    connection.request("POST", "/api/chat", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    return sum(not json.loads(line)["done"] for line in response)


def seconds(ask: Callable[[int], int], words: int) -> float:
    """The time of one request."""
    began = perf_counter()
    assert ask(words) == words
    return perf_counter() - began


def measure(times: Mapping[int, int]) -> dict[str, dict[int, float]]:
    """The median time in seconds of a request over each protocol, by the words of its answer."""
    command = [sys.executable, "-c", f"from {__spec__.name} import run_server; run_server()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        address, port = process.stdout.readline().split()
        connection = http.client.HTTPConnection("127.0.0.1", int(port))
        with Client(address) as client:
            asking: dict[str, Callable[[int], int]] = {
                "gRPC": lambda words: over_grpc(client, words),
                "HTTP": lambda words: over_http(connection, words),
            }
            found: dict[str, dict[int, list[float]]] = {name: {words: [] for words in times} for name in asking}
            for words, count in times.items():
                for _ in range(count):
                    for name, ask in asking.items():
                        found[name][words].append(seconds(ask, words))
        connection.close()
        process.stdin.close()
    return {name: {words: statistics.median(all) for words, all in by.items()} for name, by in found.items()}


def main() -> None:
    """Print the times."""
    found = measure(TIMES)
    for name, by in found.items():
        each = (by[MANY] - by[FEW]) / (MANY - FEW)
        print(f"{name}: {1e3 * by[FEW]:.2f} ms a request with {FEW} token, {1e6 * each:.0f} us each further token")


if __name__ == "__main__":
    main()
