"""What is filled in on the page, as a request for an answer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest

from runtime.errors import InvalidInput
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.tasks.chat import ChatRequest, TextDelta
from serving.dialects.python.requests import ChatOptions
from serving.page.options import Options
from serving.page.talking import OPTIONS, SWITCHES, Answers, Conversation, grammar_of, request_of

ASKED = Conversation().asked("what is it?", [], [])


def made_of(name: str) -> ChatRequest:
    """The request where one option is filled in."""
    for text in ("2", "0.5", "slide"):
        with suppress(InvalidInput):
            return request_of(ASKED, {name: True if name in SWITCHES else text})
    raise AssertionError(f"{name} takes none of these values")


def test_the_page_has_every_option_of_an_answer() -> None:
    usual = request_of(ASKED, {})
    for name in (*OPTIONS.names, *SWITCHES):
        assert getattr(made_of(name), name) != getattr(usual, name), name
    assert {*OPTIONS.names, *SWITCHES, "grammar", "scripts"} == {*ChatOptions.__annotations__}
    words = {"stop": "'a b' c", "system": "be brief", "form": "regex", "grammar": "[ab]+", "scripts": ["other"]}
    made = request_of(ASKED, words)
    assert made.stop == ("a b", "c")
    assert made.grammar == Grammar.regex("[ab]+")
    assert made.scripts == {"other": {}}
    assert [message.role for message in made.messages] == ["system", "user"]


def test_what_is_empty_is_the_models_own() -> None:
    empty = dict.fromkeys((*OPTIONS.names, "system", "form", "grammar"), "")
    made, usual = request_of(ASKED, empty), ChatRequest(request_of(ASKED, {}).messages)
    for name in (field.name for field in fields(ChatRequest) if field.name != "messages"):
        assert getattr(made, name) == getattr(usual, name), name


def test_no_option_names_a_file() -> None:
    assert {"format", "regex"}.isdisjoint(OPTIONS.names)


@pytest.mark.parametrize(
    ("filled", "said"),
    [
        ({"max_tokens": "long"}, "max_tokens: is 'long', expected a whole number"),
        ({"max_tokens": "1.5"}, "max_tokens: is '1.5', expected a whole number"),
        ({"temperature": "nan"}, "temperature: is 'nan', expected a number"),
        ({"beams": "9"}, "beams: is 9, expected 1 to 8"),
        ({"stop": "'a"}, "stop: is ''a', which has a quote"),
        ({"context_overflow": "drop"}, "context_overflow: 'drop' is not known"),
        ({"form": "schema", "grammar": "{"}, "grammar: is no JSON schema"),
        ({"form": "regex"}, "grammar: is empty"),
        ({"grammar": "a+"}, "grammar: has a text that this form does not need"),
    ],
)
def test_mistakes_name_the_field(filled: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        request_of(ASKED, filled)
    assert str(error.value).startswith(said)


def test_forms() -> None:
    assert grammar_of("", " ") is None
    assert grammar_of("json", "") == Grammar.json()
    assert grammar_of("schema", '{"type": "string"}') == Grammar.schema({"type": "string"})


def test_several_answers_are_shown_and_the_first_one_is_gone_on_from() -> None:
    token = TokenLogprob(1, b"a", -0.5)
    answers = Answers()
    for event in (TextDelta("a", 0), TextDelta("b", 1, logprobs=(token,)), TextDelta("c", 0)):
        answers = answers.joined(event)
    assert answers.texts == ("ac", "b")
    assert answers.logprobs == ((1, token),)
    assert answers.counted == "2 answers, 3 characters"
    said = ASKED.answered(answers)
    assert [message.content for message in said.messages][1:] == ["ac"]
    assert [(one["content"], one["metadata"]["title"]) for one in said.shown[1:]] == [
        ("ac", "Answer 1"), ("b", "Answer 2")
    ]  # fmt: skip
    (alone,) = ASKED.answered(Answers(("ac",))).shown[1:]
    assert alone == {"role": "assistant", "content": "ac"}
    assert Answers(("ac",)).counted == "2 characters"


def test_switches_are_lists_and_texts_are_fields() -> None:
    from serving.cli.plain import Plain

    options = Options(Plain, choices={"sampler": ("euler",)})
    assert options.read({"prompt_weights": "on", "sampler": "euler", "seed": " 5 "}) == {
        "prompt_weights": True, "sampler": "euler", "seed": 5
    }  # fmt: skip
    assert options.part("prompt_weights", "a", "usual").choices == [("usual", ""), ("on", "on"), ("off", "off")]
    assert options.part("seed", "a", "random").placeholder == "random"
    assert options.part("seed", "a", "random").elem_id == "a-seed"
