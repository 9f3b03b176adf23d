"""A whole pipeline calls functions, by a random model: what it may write decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.language.calls import ToolCall
from runtime.language.grammar import Grammar
from runtime.language.templates import ChatTemplate, Message
from runtime.language.tools import Tool, Toolbox
from runtime.pipeline import Event, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatRequest, Finished, TextDelta, ToolCalled
from tests.runtime.pipelines import test_chat as tiny

TEMPLATE = """
{%- if tools %}{% for tool in tools %}{{ tool.function.name + ' ' + tool.function.description }}{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role.upper() + ': ' }}{% for call in m.tool_calls or () %}
{{- '<call>{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}</call>' }}{%- endfor %}{{ m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""
SCHEMA = {"type": "object", "properties": {"is": {"enum": ["red", "green"]}}, "required": ["is"],
          "additionalProperties": False}  # fmt: skip
PAINT, MIX = Tool("paint", "Paint it.", SCHEMA), Tool("mix", "Mix colours.", SCHEMA)
REQUEST = ChatRequest(tiny.CONVERSATIONS["text"], max_tokens=150, tools=Toolbox((PAINT, MIX), must=True))


@pytest.fixture(scope="module")
def engines() -> dict[str, FakeEngine]:
    return tiny.build_engines(tiny.build_model())


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatPipeline:
    root: Path = tmp_path_factory.mktemp("tiny")
    tiny.write_bundle(root, tiny.build_processor(), tiny.CONFIG.model_dump())
    made = ChatPipeline(root, tiny.CONFIG.model_dump())
    (root / "tools").mkdir()
    (root / "tools" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "tools" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    made.text.template = ChatTemplate(root / "tools")  # type: ignore[attr-defined]
    return made


def run(chat: ChatPipeline, engines: dict[str, FakeEngine], request: ChatRequest) -> tuple[list[Event], Finished]:
    *events, end = drive(chat(request), engines)
    assert isinstance(end, Finished)
    return events, end


def test_an_answer_that_must_call_does(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    ((event,), end) = run(chat, engines, REQUEST)
    assert isinstance(event, ToolCalled) and event.call.name in ("paint", "mix")
    assert event.call.arguments["is"] in ("red", "green") and end.reason == "stop"
    for name in ("paint", "mix"):
        ((event,), _) = run(chat, engines, replace(REQUEST, tools=Toolbox((PAINT, MIX), True, name)))
        assert isinstance(event, ToolCalled) and event.call.name == name


def test_several_answers_call(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    events = list(drive(chat(replace(REQUEST, answers=2)), engines))
    calls = [event for event in events if isinstance(event, ToolCalled)]
    assert [call.answer for call in calls] == [0, 1] and calls[0].call == calls[1].call


def test_an_answer_that_may_call_is_the_text_that_it_would_be(
    chat: ChatPipeline, engines: dict[str, FakeEngine]
) -> None:
    """A random model writes no call by itself."""
    request = replace(REQUEST, max_tokens=12, tools=Toolbox((PAINT,)))
    events, end = run(chat, engines, request)
    assert "".join(one.text for one in events if isinstance(one, TextDelta)) and end.completion_tokens <= 12
    prompt = chat.text.tokenizer.decode(chat.prompt(request).ids)
    assert "paint Paint it." in prompt and "mix" not in prompt


def test_a_call_behind_a_text_has_its_form(chat: ChatPipeline) -> None:
    constraint = chat.constraints.calls(chat.text.call_form(), (PAINT, MIX), must=False)

    def follow(text: str) -> str:
        """What single letters may follow, behind what was said."""
        for token in chat.text.tokenizer.encode(text, add_special_tokens=False).ids:
            constraint.push(token)
        letters = {letter: chat.text.tokenizer.token_to_id(letter) for letter in 'abcdefghijklmnopqrstuvwxyz{}"<'}
        most = constraint.most(tiny.CONFIG.vocab_size)
        return "".join(letter for letter, token in letters.items() if most[token] > 0)

    assert len(follow("so ")) == 30 and len(follow('<call>{"name" ')) == 30
    assert follow('<call>{"name": "') == "mp"
    assert follow('paint", "arguments": {"is": "r') == "e"
    assert follow('ed"}}</call') == "" and not constraint.complete
    assert follow(">") == "" and constraint.complete


def test_a_call_that_a_length_cuts_is_text(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    events, end = run(chat, engines, replace(REQUEST, max_tokens=10))
    text = "".join(one.text for one in events if isinstance(one, TextDelta))
    assert text.startswith('<call>{"') and end.reason == "length"


def test_calls_and_results_are_in_the_prompt(chat: ChatPipeline) -> None:
    said = Message("assistant", ("",), (ToolCall("paint", {"is": "red"}),))
    asked = replace(REQUEST, messages=(tiny.user("go"), said, Message("tool", ("done",), tool="paint")))
    prompt = chat.text.tokenizer.decode(chat.prompt(asked).ids, skip_special_tokens=False)
    assert 'ASSISTANT: <call>{"name": "paint", "arguments": {"is": "red"}}</call></s>TOOL: done</s>' in prompt


@pytest.mark.parametrize(
    ("change", "field", "why"),
    [
        ({"grammar": Grammar.json()}, "grammar", "does not go with tools"),
        ({"logprobs": 1}, "logprobs", "does not go with tools"),
        ({"beams": 2}, "tools", "does not go with 2 beams"),
        ({"raw": True}, "raw", "does not go with tools"),
        ({"tools": Toolbox((Tool("x", "</s>"),))}, "tools", "contains </s>, a special token"),
        ({"tools": Toolbox((Tool("x", parameters={"properties": {"a": {"not": {}}}}),), True)}, "tools", "be followed"),
    ],
)
def test_what_does_not_go_is_named(chat: ChatPipeline, change: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        chat(ChatRequest(**({"messages": REQUEST.messages, "tools": REQUEST.tools} | change)))
    assert caught.value.field == field and why in caught.value.reason


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: Tool("a b"), "has the name 'a b', expected 1 to 64 letters"),
        (lambda: Tool("a", parameters={"type": "string"}), "whose parameters are no object"),
        (lambda: Tool("a", parameters={"x-guidance": {}}), "not of JSON schema"),
        (lambda: Toolbox((PAINT, PAINT)), "has two functions of one name"),
        (lambda: Toolbox(()), "is empty, expected one function or more"),
        (lambda: Toolbox((PAINT,) * 129), "expected at most 128"),
        (lambda: Toolbox((PAINT,), True, "pain"), "names no function of tools: did you mean 'paint'"),
        (lambda: Toolbox((Tool("a", "\ud800"),)), "half a surrogate pair"),
        (lambda: Toolbox((Tool("a", "x" * 1_000_001),)), "at most"),
    ],
)
def test_tools_that_are_none(made: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        made()


def test_a_template_without_tools_is_named(tmp_path: Path) -> None:
    tiny.write_bundle(tmp_path, tiny.build_processor(), tiny.CONFIG.model_dump())
    plain = ChatPipeline(tmp_path, tiny.CONFIG.model_dump())
    with pytest.raises(InvalidInput, match="tools: cannot be called by this model, whose chat template shows no func"):
        plain(REQUEST)
