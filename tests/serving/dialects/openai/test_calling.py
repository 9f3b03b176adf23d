"""Calls of functions with the package openai, unchanged."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from runtime.language.calls import ToolCall
from runtime.language.tools import Tool, Toolbox
from runtime.tasks.chat import ChatRequest
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer, note_requests

CHAT = "POST /v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "paint", "description": "Paint it.", "parameters": SCHEMA, "strict": True},
    },
    {"type": "function", "function": {"name": "mix"}},
]
BOX = (Tool("paint", "Paint it.", SCHEMA), Tool("mix"))
ASKED: Any = [{"role": "user", "content": "paint it"}]


@pytest.fixture
def asked(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> list[ChatRequest]:
    """The requests that reach the model."""
    model, found = fake.models["talk"], list[ChatRequest]()
    monkeypatch.setattr(model, "pipeline", model.pipeline)  # undone behind the test
    note_requests(model, found)
    return found


@proves(CHAT, "tools", "tools[].type", "tools[].function", "tools[].function.name", "tools[].function.description")
@proves(CHAT, "tools[].function.parameters", "tool_choice", "tool_choice.type", "tool_choice.function")
@proves(CHAT, "tool_choice.function.name")
def test_calls(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    found = client.chat.completions.create(
        model="talk", messages=ASKED, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    (choice,) = found.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == "paint"
    assert json.loads(call.function.arguments) == {"of": "red"}
    assert found.usage is not None and found.usage.completion_tokens == 1
    named: Any = {"type": "function", "function": {"name": "mix"}}
    one = client.chat.completions.create(model="talk", messages=ASKED, tools=TOOLS, tool_choice=named)
    assert [call.function.name for call in one.choices[0].message.tool_calls or ()] == ["mix"]  # type: ignore[union-attr]
    for choice_of in ("auto", "none"):
        free = client.chat.completions.create(model="talk", messages=ASKED, tools=TOOLS, tool_choice=choice_of)  # type: ignore[arg-type]
        assert free.choices[0].message.content == "a red círcle" and free.choices[0].message.tool_calls is None
    assert [one.tools for one in asked] == [Toolbox(BOX, True), Toolbox(BOX, True, "mix"), Toolbox(BOX), None]
    with pytest.raises(openai.BadRequestError, match="names no function of tools: did you mean 'mix'"):
        client.chat.completions.create(
            model="talk", messages=ASKED, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "mux"}}
        )


@proves(CHAT, "stream")
def test_calls_in_streams(client: openai.OpenAI, fake: FakeServer) -> None:
    sent: Any = {"model": "talk", "messages": ASKED, "tools": TOOLS, "tool_choice": "required", "n": 2}
    chunks = list(client.chat.completions.create(**sent, stream=True))
    assert [(chunk.choices[0].index, chunk.choices[0].finish_reason) for chunk in chunks] == [
        (0, None),
        (0, "tool_calls"),
        (1, None),
        (1, "tool_calls"),
    ]
    (call,) = chunks[0].choices[0].delta.tool_calls or ()
    assert call.function is not None and (call.index, call.function.name) == (0, "paint")
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    with client.chat.completions.stream(**{**sent, "n": 1}) as stream:
        whole: Any = stream.get_final_completion()
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"of": "red"}'


@proves(CHAT, "messages[].tool_calls", "messages[].tool_calls[].id", "messages[].tool_calls[].type")
@proves(CHAT, "messages[].tool_calls[].function", "messages[].tool_calls[].function.name", "messages[].tool_call_id")
@proves(CHAT, "messages[].tool_calls[].function.arguments")
def test_results_are_sent_back(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    found = client.chat.completions.create(model="talk", messages=ASKED, tools=TOOLS, tool_choice="required")
    said: Any = found.choices[0].message
    result: Any = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "it is red"}
    client.chat.completions.create(model="talk", messages=[*ASKED, said, result], tools=TOOLS)
    _, answer, tool = asked[1].messages
    assert (answer.role, answer.content, answer.calls) == ("assistant", ("",), (ToolCall("paint", {"of": "red"}),))
    assert (tool.role, tool.content, tool.tool) == ("tool", ("it is red",), "paint")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ('{"of": "\\ud800"}', "holds half a surrogate pair"),
        (json.dumps({"of": [0] * 10_001}), "has more than 10,000 values"),
        (json.dumps({"of": "x" * 100_000}), "characters of all texts"),
        ("[" * 9_000, "is no JSON object"),
    ],
)
def test_arguments_that_are_refused(client: openai.OpenAI, arguments: str, why: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": arguments}}
    said: Any = {"role": "assistant", "content": None, "tool_calls": [call]}
    result: Any = {"role": "tool", "tool_call_id": "1", "content": "it is red"}
    with pytest.raises(openai.BadRequestError, match=why):
        client.chat.completions.create(model="talk", messages=[*ASKED, said, result], tools=TOOLS)
