"""Conversations with Ollama's own Python client, unchanged."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ollama import AsyncClient, ResponseError

from runtime.errors import EngineError
from runtime.language.calls import ToolCall
from runtime.language.grammar import Grammar
from runtime.vision.images import encode_image
from serving.host.offers import ENDLESS
from tests.fakes.proofs import proves
from tests.fakes.serving import until
from tests.serving.dialects.ollama.conftest import Served

PICTURE = encode_image(np.full((4, 6, 3), 200, np.uint8))
SCHEMA = {"type": "object", "properties": {"shape": {"type": "string"}}, "required": ["shape"]}
QUESTION = [{"role": "user", "content": "What is it?"}]


@proves("POST /api/chat", "model", "messages", "messages[].role", "messages[].content", "messages[].images", "stream")
def test_one_answer(served: Served) -> None:
    answer = served.client.chat(
        "talk",
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "What is it?", "images": [PICTURE]},
            {"role": "assistant", "content": "a circle"},
            {"role": "user", "content": "Its colour?"},
        ],
    )
    assert (answer.message.role, answer.message.content) == ("assistant", "a red círcle")
    assert (answer.model, answer.done, answer.done_reason) == ("talk", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (7, 3)
    assert answer.created_at is not None and answer.created_at.endswith("Z")
    (request,) = served.requests
    assert [turn.role for turn in request.messages] == ["system", "user", "assistant", "user"]
    assert request.images[0].data == PICTURE and request.messages[1].content[1] == "What is it?"
    assert (request.context_overflow, request.grammar, request.logprobs, request.answers) == ("slide", None, None, 1)


@proves("POST /api/chat", "stream")
def test_a_stream(served: Served) -> None:
    pieces = list(served.client.chat("talk:latest", QUESTION, stream=True))
    assert [piece.message.content for piece in pieces] == ["a ", "red ", "círcle", ""]
    assert [piece.done for piece in pieces] == [False, False, False, True]
    last = pieces[-1]
    assert (last.model, last.done_reason, last.eval_count) == ("talk:latest", "stop", 3)
    durations = [last.load_duration, last.prompt_eval_duration, last.eval_duration]
    assert last.total_duration is not None and all(one is not None and one >= 0 for one in durations)
    assert last.total_duration >= sum(one or 0 for one in durations) > 0


def test_streams_unless_told_otherwise(served: Served) -> None:
    response = served.client._client.post("/api/chat", json={"model": "talk", "messages": QUESTION})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["done"] for line in response.text.splitlines()] == [False, False, False, True]


def test_asynchronously(served: Served) -> None:
    async def both() -> tuple[str, str]:
        async with AsyncClient(served.url) as client:
            whole = await client.chat("talk", QUESTION)
            pieces = [piece async for piece in await client.chat("talk", QUESTION, stream=True)]
        return whole.message.content or "", "".join(piece.message.content or "" for piece in pieces)

    assert asyncio.run(both()) == ("a red círcle",) * 2


@proves(
    "POST /api/chat",
    "options",
    "options.temperature",
    "options.top_k",
    "options.top_p",
    "options.min_p",
    "options.repeat_penalty",
    "options.presence_penalty",
    "options.frequency_penalty",
    "options.num_predict",
    "options.stop",
    "options.seed",
    "truncate",
)
def test_options(served: Served) -> None:
    options: dict[str, Any] = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.2, "num_predict": 2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "stop": "x", "seed": 5, "num_ctx": 4096, "num_gpu": 1,
        "mirostat": 0, "typical_p": 1.0, "use_mmap": True,
    }  # fmt: skip
    answer = served.client.chat("talk", QUESTION, options=options)
    assert (answer.message.content, answer.done_reason) == ("a red ", "length")
    (request,) = served.requests
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 7, 0.9, 0.1)
    assert (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) == (1.2, 0.3, -0.4)
    assert (request.max_tokens, request.stop, request.seed) == (2, ("x",), 5)
    body = {"model": "talk", "messages": QUESTION, "options": {"seed": -1, "stop": ["x", "y"]}, "truncate": False}
    assert served.post("/api/chat", body)[0] == 200
    assert (served.requests[1].seed, served.requests[1].stop) == (None, ("x", "y"))
    assert served.requests[1].context_overflow == "refuse"


@proves("POST /api/chat", "format")
def test_formats(served: Served) -> None:
    for given in ("json", SCHEMA, ""):
        served.client.chat("talk", QUESTION, format=given)  # type: ignore[arg-type]
    assert [one.grammar for one in served.requests] == [Grammar.json(), Grammar.schema(SCHEMA), None]
    for other, why in (
        ("xml", "is 'xml', expected 'json'"),
        (5, "is no format"),
        ({"a": {1: 2}, "x-guidance": 1}, "x-"),
    ):
        status, content = served.post("/api/chat", {"model": "talk", "messages": QUESTION, "format": other})
        assert status == 400 and content["error"].startswith("format: ") and why in content["error"]


@proves("POST /api/chat", "logprobs", "top_logprobs")
def test_log_probabilities(served: Served) -> None:
    answer = served.client.chat("talk", QUESTION, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    assert [one.token for one in answer.logprobs] == ["a ", "red ", "círcle"]
    assert answer.logprobs[0].logprob == pytest.approx(math.log(0.5))
    assert [one.token for one in answer.logprobs[2].top_logprobs or ()] == ["a ", "red "]
    pieces = list(served.client.chat("talk", QUESTION, logprobs=True, stream=True))
    assert [len(piece.logprobs or ()) for piece in pieces] == [1, 1, 1, 0]
    assert "logprobs" not in served.post("/api/chat", {"model": "talk", "messages": QUESTION, "stream": False})[1]
    with pytest.raises(ResponseError, match="top_logprobs: is 3 without logprobs"):
        served.client.chat("talk", QUESTION, top_logprobs=3)
    with pytest.raises(ResponseError, match="top_logprobs: is 21, expected 0 to 20"):
        served.client.chat("talk", QUESTION, logprobs=True, top_logprobs=21)


@proves("POST /api/chat", "keep_alive")
@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        (0, 0),
        ("0", 0),
        (-1, ENDLESS),
        ("-1m", ENDLESS),
        (90, 90),
    ],
)
def test_keep_alive(served: Served, given: Any, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float | None] = []
    used = served.fake.host.lifecycle.keep_alive.used

    def noting(model: Any, wait: float | None = None) -> None:
        found.append(wait)
        used(model, wait)

    monkeypatch.setattr(served.fake.host.lifecycle.keep_alive, "used", noting)
    served.client.chat("talk", QUESTION, keep_alive=given)
    assert found[-1] == seconds


def test_without_messages_the_model_is_loaded(own: Served) -> None:
    answer = own.client.chat("talk", [])
    assert (answer.done, answer.done_reason, answer.message.content) == (True, "load", "")
    assert own.fake.loads == [("talk", None)] and own.requests == []


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"model": "tolk"}, 404, "model 'tolk' is not served here: did you mean 'talk'?"),
        ({"model": "talk:9"}, 404, "model 'talk@9' is not served here"),
        ({"model": ""}, 400, "model: is missing"),
        ({}, 400, "model: is missing, and is required"),
        ({"model": "draw"}, 400, "model: draw has the task image"),
        ({"options": {"min_p": 2}}, 400, "options.min_p: is 2"),
        ({"options": {"num_predict": 1.5}}, 400, "options.num_predict: input should be a valid integer"),
        ({"options": {"temperature": "hot"}}, 400, "options.temperature: input should be a valid number"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat: tokens are not chosen in this way"),
        ({"options": {"steps": 2}}, 400, "options.steps: is not known here"),
        ({"options": {"negative_prompt": "x"}}, 400, "options.negative_prompt: is not known here"),
        ({"options": {"stop": ["x"] * 17}}, 400, "options.stop: has 17 strings"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function: is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools: has the name 'a b'"),
        ({"think": True}, 400, "think: models here have no thoughts"),
        ({"think": "high"}, 400, "think: models here have no thoughts"),
        ({"keep_alive": "soon"}, 400, "keep_alive: is no duration"),
        ({"keep_alive": True}, 400, "keep_alive: is no duration"),
        ({"keep_alive": "1000h"}, 400, "keep_alive: is 3600000.0, expected -1 to 604800"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role: input should be"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            400,
            "messages[0].role: is 'assistant', expected 'user'",
        ),
        ({"messages": [{"role": "user", "content": "x", "images": ["?"]}]}, 400, "messages[0].images[0]: is no base64"),
        ({"messages": [{"role": "user", "content": "x", "images": ["eHg="]}]}, 400, "messages[0].images[0]: is no PNG"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content: holds half a surrogate"),
        ({"messages": [{"role": "user", "content": "x", "thinking": "hm"}]}, 400, "messages[0].thinking: models here"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_001}]}, 400, "messages: has 1,000,001"),
        ({"stream": "yes"}, 400, "stream: input should be a valid boolean"),
        ({"nonsense": 1}, 400, "nonsense: is not known here: leave it out"),
    ],
)
def test_mistakes(served: Served, body: dict[str, Any], status: int, why: str) -> None:
    sent = {"model": "talk", "messages": QUESTION, **body} if body else {"messages": QUESTION}
    found, content = served.post("/api/chat", sent)
    assert (found, list(content)) == (status, ["error"]) and content["error"].startswith(why), content


def test_an_early_error_has_a_status(served: Served) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    damaged = base64.b64encode(encode_image(noise)[:-1000]).decode()
    body = {"model": "talk", "messages": [{"role": "user", "images": [damaged]}]}
    status, content = served.post("/api/chat", body)
    assert status == 400 and content["error"].startswith("messages[0].images[0]: is a damaged picture")


def test_an_error_in_the_middle_is_a_line(own: Served) -> None:
    talk = own.fake.models["talk"]
    own.client.chat("talk", [])
    talk.hold()
    talk.let(1)
    pieces = own.client.chat("talk", QUESTION, stream=True)
    assert next(pieces).message.content == "a "
    talk.failure = EngineError("the device is lost")
    talk.release()
    with pytest.raises(ResponseError, match="the device is lost"):
        list(pieces)


def paint(colour: str) -> str:
    """Paint it.

    Args:
      colour: Its colour.
    """
    return colour


@proves("POST /api/chat", "tools", "tools[].type", "tools[].function", "tools[].function.name")
@proves("POST /api/chat", "tools[].function.description", "tools[].function.parameters", "messages[].tool_calls")
@proves("POST /api/chat", "messages[].tool_calls[].function", "messages[].tool_calls[].function.name")
@proves("POST /api/chat", "messages[].tool_calls[].function.arguments", "messages[].tool_name")
def test_calls_of_functions(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client makes a tool of a Python function; the model chooses to call it."""
    own = served.fake.models["talk"].pipeline

    def calling(request: Any) -> Any:
        return own(replace(request, tools=replace(request.tools, must=request.messages[-1].role == "user")))

    monkeypatch.setattr(served.fake.models["talk"], "pipeline", calling)
    answer = served.client.chat("talk", QUESTION, tools=[paint])
    (call,) = answer.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("paint", {"of": "red"})
    assert (answer.message.content, answer.done_reason, answer.eval_count) == ("", "stop", 1)
    pieces = list(served.client.chat("talk", QUESTION, tools=[paint], stream=True))
    assert [len(piece.message.tool_calls or ()) for piece in pieces] == [1, 0] and pieces[-1].done
    result = {"role": "tool", "tool_name": "paint", "content": "it is red"}
    again = served.client.chat("talk", [*QUESTION, answer.message, result], tools=[paint])
    assert again.message.content == "a red círcle" and not again.message.tool_calls
    tool = served.requests[0].tools.tools[0]
    assert (tool.name, tool.description, tool.parameters["required"]) == ("paint", "Paint it.", ["colour"])
    _, said, last = served.requests[2].messages
    assert said.calls == (ToolCall("paint", {"of": "red"}),)
    assert (last.role, last.content, last.tool) == ("tool", ("it is red",), "paint")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(served: Served, stream: bool) -> None:
    talk = served.fake.models["talk"]
    served.client.chat("talk", [])
    talk.hold()
    talk.let(1)
    calls = talk.calls
    body = json.dumps({"model": "talk", "messages": QUESTION, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", served.server.port)) as connection:
        head = f"POST /api/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: talk.calls == calls + 2)
    until(lambda: all(run.job.stopped_by is not None for run in served.fake.host.catalog.find("talk").runs))
    talk.release()
    until(lambda: served.fake.busy("talk") == 0)
    assert talk.calls == calls + 2
