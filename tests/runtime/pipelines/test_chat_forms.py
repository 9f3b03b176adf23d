"""Answers of a given form, their log probabilities, and penalties, by a whole pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.language.sampling import Beams, Rules
from runtime.pipeline import Event, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatDefaults, ChatRequest, Finished, TextDelta
from tests.runtime.pipelines import test_chat as tiny

SCHEMA = Grammar.schema(
    {
        "type": "object", "required": ["is", "count"], "additionalProperties": False,
        "properties": {"is": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    }
)  # fmt: skip
REQUEST = ChatRequest(
    tiny.CONVERSATIONS["picture"], max_tokens=200, temperature=0.0, grammar=SCHEMA, frequency_penalty=2.0
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build_model()


@pytest.fixture
def engines(model: Any) -> dict[str, FakeEngine]:
    return tiny.build_engines(model)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatPipeline:
    root: Path = tmp_path_factory.mktemp("tiny")
    tiny.write_bundle(root, tiny.build_processor(), tiny.CONFIG.model_dump())
    return ChatPipeline(root, tiny.CONFIG.model_dump())


def said(events: list[Event], number: int = 0) -> str:
    return "".join(one.text for one in events if isinstance(one, TextDelta) and one.answer == number)


def ends(events: list[Event]) -> list[Finished]:
    return [one for one in events if isinstance(one, Finished)]


def tokens(events: list[Event]) -> list[TokenLogprob]:
    return [token for one in events if isinstance(one, TextDelta) for token in one.logprobs]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "answers": 2, "top_p": 0.9, "min_p": 0.01}])
def test_answers_have_their_form_and_end_with_it(
    chat: ChatPipeline, engines: dict[str, FakeEngine], settings: dict[str, Any]
) -> None:
    """A random model writes JSON, and stops without an end token; each answer is followed by itself."""
    request = replace(REQUEST, **settings)
    events = list(drive(chat(request), engines))
    found = [json.loads(said(events, number)) for number in range(request.answers or 1)]
    assert all(set(one) == {"is", "count"} and one["is"] in ("red", "green") for one in found)
    assert [(one.answer, one.reason) for one in ends(events)] == [(number, "stop") for number in range(len(found))]
    for number in range(len(found)):
        alone = replace(request, answers=None, seed=(request.seed or 0) + number)
        assert said(list(drive(chat(alone), engines))) == said(events, number)


def test_a_length_cuts_a_form_and_a_stop_string_too(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    whole = said(list(drive(chat(REQUEST), engines)))
    events = list(drive(chat(replace(REQUEST, max_tokens=7)), engines))
    assert whole.startswith(said(events)) and ends(events)[0].reason == "length"
    events = list(drive(chat(replace(REQUEST, stop=('"is"',))), engines))
    assert said(events) == whole[: whole.index('"is"')] and ends(events)[0].reason == "stop"


def test_a_form_yields_to_no_rule_of_the_model(
    chat: ChatPipeline, engines: dict[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end that is forced at the length would say that the answer is complete."""
    defaults = ChatDefaults(rules=Rules(forced_eos_token_id=(tiny.EOS,), bad_words_ids=((9,),)))
    monkeypatch.setattr(chat, "config", chat.config.model_copy(update={"defaults": defaults}))
    events = list(drive(chat(replace(REQUEST, max_tokens=7)), engines))
    assert ends(events)[0].reason == "length" and len(said(events).encode()) == 7
    free = list(drive(chat(replace(REQUEST, max_tokens=7, grammar=None)), engines))
    assert ends(free)[0].reason == "stop"
    forced = ChatDefaults(rules=Rules(forced_bos_token_id=9))
    with pytest.raises(InvalidInput, match=r"grammar: .*forces the first token"):
        REQUEST.sampling(forced)


@pytest.mark.parametrize("name", ["text", "turns"])
def test_log_probabilities_equal_transformers(
    chat: ChatPipeline, engines: dict[str, FakeEngine], model: Any, name: str
) -> None:
    """They are of the model's logits, whatever a penalty makes of these."""
    request = ChatRequest(tiny.CONVERSATIONS[name], max_tokens=24, repetition_penalty=1.3, logprobs=5)
    options = {"repetition_penalty": 1.3, "output_logits": True, "return_dict_in_generate": True}
    wanted = generated(model, request, options)
    events = list(drive(chat(request), engines))
    found = tokens(events)
    assert b"".join(one.piece for one in found).decode(errors="replace") == said(events)
    assert len(found) >= 20
    for one, logits in zip(found, wanted, strict=False):
        scores = torch.log_softmax(logits[0].float(), -1)
        best = scores.topk(5)
        np.testing.assert_allclose(one.logprob, float(scores[one.id]), atol=1e-4)
        np.testing.assert_allclose([top.logprob for top in one.top], best.values.numpy(), atol=1e-4)
        assert [top.id for top in one.top] == best.indices.tolist()


def generated(model: Any, request: ChatRequest, options: dict[str, Any]) -> Any:
    """The logits of each step of transformers' generate."""
    seen: list[Any] = []

    class Kept:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def generate(self, **given: Any) -> Any:
            seen.append(model.generate(**given))
            return seen[-1].sequences

    tiny.transformers_tokens(Kept(), tiny.build_processor(), request, **options)
    return seen[0].logits


def test_log_probabilities_change_no_answer(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    request = ChatRequest(tiny.CONVERSATIONS["picture"], max_tokens=16, temperature=1.2, seed=5, answers=2)
    plain = list(drive(chat(request), engines))
    told = list(drive(chat(replace(request, logprobs=0)), engines))
    assert [replace(one, logprobs=()) if isinstance(one, TextDelta) else one for one in told] == plain
    assert not tokens(plain) and all(not one.top for one in tokens(told)) and tokens(told)


def test_penalties_of_counts_make_answers_repeat_less(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    request = ChatRequest(tiny.CONVERSATIONS["text"], max_tokens=40, temperature=0.0, logprobs=0)
    free, penalized = (
        [one.id for one in tokens(list(drive(chat(one), engines)))]
        for one in (request, replace(request, frequency_penalty=2.0, presence_penalty=2.0))
    )
    assert free[0] == penalized[0]
    assert len(set(penalized)) / len(penalized) > len(set(free)) / len(free)


@pytest.mark.parametrize("change", [{"grammar": Grammar.json()}, {"logprobs": 0}])
def test_what_follows_one_answer_does_not_go_with_beams(change: dict[str, Any]) -> None:
    request, defaults = ChatRequest(tiny.CONVERSATIONS["text"], **change), ChatDefaults(beams=4)
    assert request.search(defaults) == Beams(1)
    (field,) = change
    with pytest.raises(InvalidInput, match=f"{field}: does not go with 2 beams: send beams 1"):
        replace(request, beams=2).search(defaults)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"grammar": Grammar.schema({"type": "objekt"})}, "grammar"),
    ],
)
def test_bad_requests_are_named_before_any_call(chat: ChatPipeline, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        chat(ChatRequest(tiny.CONVERSATIONS["text"], **change))
    assert caught.value.field == field


def test_min_p_of_a_request_stands_for_the_models() -> None:
    defaults = ChatDefaults(rules=Rules(min_p=0.3, typical_p=0.5))
    request = ChatRequest(tiny.CONVERSATIONS["text"])
    assert request.sampling(defaults).rules == defaults.rules
    assert replace(request, min_p=0.0).sampling(defaults).rules == Rules(typical_p=0.5)
