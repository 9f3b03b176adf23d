"""Lines of the log: for people and as JSON, with the ids of requests, and one for each request."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidInput
from serving.enginecast_pb import chat_pb2
from serving.host.observing import Observer, Record, recorded
from serving.observers import logs
from serving.observers.logs import JsonFormat, RequestLog, TextFormat
from tests.fakes.serving import FakeServer, request, until

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """The JSON lines about requests."""
    caplog.set_level(logging.INFO)
    form = JsonFormat()
    return lambda: [json.loads(form.format(each)) for each in caplog.records if each.name == "enginecast.requests"]


def entry(message: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("serving", logging.WARNING, "file", 1, message, values, None)


def test_a_line_of_json_has_the_id_of_its_request() -> None:
    with recorded(Record(id="order-17"), Observer()):
        line = json.loads(JsonFormat().format(entry('a "quoted"\nline of %s', "círcles")))
    assert line["message"] == 'a "quoted"\nline of círcles' and line["request_id"] == "order-17"
    assert (line["level"], line["logger"]) == ("WARNING", "serving") and line["time"].endswith("+00:00")


def test_a_line_of_json_is_one_line() -> None:
    assert "\n" not in JsonFormat().format(entry("two\nlines"))


def test_a_line_of_text_has_the_id_of_its_request() -> None:
    with recorded(Record(id="order-17"), Observer()):
        assert TextFormat().format(entry("full")).endswith("WARNING serving: full [order-17]")
    assert TextFormat().format(entry("full")).endswith("WARNING serving: full")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"log_format: 'jsn' is not known: did you mean 'json'"):
        logs.configure("jsn")


def test_each_request_has_one_line_when_it_ends(tmp_path: Path, lines: Lines) -> None:
    with FakeServer(tmp_path, observers=[RequestLog()], ready=True) as server:
        server.alive()
        until(lambda: any(line["method"].endswith("/Generate") for line in lines()))
    (line,) = [line for line in lines() if line["method"].endswith("/Generate")]
    assert line["message"].startswith("enginecast.v1.ImageService/Generate draw OK in 0.")
    assert (line["model"], line["task"], line["code"]) == ("draw", "image", "OK")
    assert (line["steps"], line["pictures"]) == (2, 1)
    assert 0 < line["first_output_seconds"] <= line["seconds"] < 10


def test_no_line_has_a_text_of_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither of a request that is answered nor of one that is refused."""
    caplog.set_level(logging.DEBUG)
    secret = "xyzzy"
    turn = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=[chat_pb2.Part(text=secret)])
    with FakeServer(tmp_path, observers=[RequestLog()], ready=True) as server:
        list(server.client.chat(chat_pb2.ChatRequest(model="talk", messages=[turn])))
        list(server.client.generate(request(prompt=secret, steps=1)))
        for wrong in (request(prompt=secret, steps=0), request(model="none", prompt=secret)):
            with pytest.raises(Exception, match=r"steps|served"):
                list(server.client.generate(wrong))
        until(lambda: Counter(each.name for each in caplog.records)["enginecast.requests"] >= 4)
    written = " ".join(TextFormat().format(each) + JsonFormat().format(each) for each in caplog.records)
    assert "NOT_FOUND" in written and "INVALID_ARGUMENT" in written and secret not in written


def test_checks_of_health_are_quiet_and_faults_loud(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for record in (Record(method="Check"), Record(method="Chat", model="talk"), Record(method="Chat", code="INTERNAL")):
        record.ended = 0.25
        RequestLog().ended(record)
    assert [each.levelname for each in caplog.records] == ["DEBUG", "INFO", "ERROR"]
