"""Guesses of a draft change no answer, are of the right positions, and spare calls of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.signature import Array
from runtime.engine import Engine, FakeEngine, Slot, SlotCall
from runtime.errors import InvalidInput
from runtime.language.drafting import LEAST, Draft
from runtime.language.grammar import Grammar
from runtime.language.text import Message
from runtime.pipeline import drive
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from samples.world.questions import test_questions as draw_questions
from serving.host import batches
from serving.host.job import Job
from tests.runtime.language.test_guessing import TABLE, VOCABULARY, Toy, calls, embedded, seen
from tests.runtime.pipelines import test_chat as tiny
from tests.serving.host.test_scheduler import text, together

HEADS = 5


class Stateful(Toy):
    """The toy, whose hidden state is the token of the position."""

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        hidden = inputs["inputs_embeds"][:, -count:].copy()
        return super().run_last(inputs, slot, count) | {"hidden_states": hidden}


def ahead(inputs: Mapping[str, Array], shift: int = 0) -> dict[str, Array]:
    """The toy's own greedy answer, or with a shift of all tokens a wrong one."""
    now, token = (int(inputs[name][0, 0, 0]) for name in ("hidden_states", "inputs_embeds"))
    logits = np.zeros((1, HEADS, VOCABULARY), np.float32)
    for head in range(HEADS):
        now, token = token, int(TABLE[(token + 7 * now) % VOCABULARY].argmax())
        logits[0, head, (token + shift) % VOCABULARY] = 30
    return {"logits": logits}


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return {
        "vision_encoder": FakeEngine(seen), "token_embedding": FakeEngine(embedded), "decoder": Stateful(),
        "draft": FakeEngine(ahead),
    }  # fmt: skip


@pytest.fixture
def chat(tmp_path: Path) -> ChatPipeline:
    tiny.write_bundle(tmp_path, tiny.build_processor(), tiny.CONFIG.model_dump())
    return ChatPipeline(tmp_path, tiny.CONFIG.model_dump() | {"draft": True})


ASKED = ChatRequest((tiny.user(tiny.picture(0), "what?"), Message("assistant", ("a cat",)), tiny.user("and?")), 49)


def test_every_guess_of_the_right_token_is_accepted(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    """So each is of the position that its token was chosen behind, also where that was accepted itself."""
    wanted = list(drive(chat(ASKED), engines))
    assert len(calls(engines)) == 1 + 48 and not engines["draft"].calls
    for count in (1, 3, HEADS, 16):
        found = list(drive(chat(replace(ASKED, draft_tokens=count)), engines))
        end = found[-1]
        assert found == wanted and isinstance(end, Finished) and end.guessed_tokens == end.accepted_tokens
        _, *made = calls(engines)
        assert sum(made) == 48 and set(made[:-1]) == {1 + min(count, HEADS)}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.2, "logprobs": 3},
        {"temperature": 0.7, "seed": 3, "answers": 3, "top_p": 0.9},
        {"temperature": 1.5, "seed": 1, "lookup_tokens": 3},
        {"grammar": Grammar.regex("(to be, |or not ){5}")},
        {"stop": ("\n",), "lookup_tokens": 4, "prediction": "to be or not"},
    ],
    ids=str,
)
def test_answers_are_the_same(
    chat: ChatPipeline, engines: dict[str, FakeEngine], settings: dict[str, Any], shift: int
) -> None:
    """Texts, their pieces, log probabilities, ends and counts: all events, whether guesses are right or wrong."""
    engines["draft"] = FakeEngine(lambda inputs: ahead(inputs, shift))
    request = replace(ASKED, **settings)
    wanted = list(drive(chat(request), engines))
    for count in (1, 4):
        found = list(drive(chat(replace(request, draft_tokens=count)), engines))
        assert found == wanted
        assert sum(end.guessed_tokens for end in found if isinstance(end, Finished)) > 5


def test_the_lookup_comes_first(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    wanted = list(drive(chat(ASKED), engines))
    said = "".join(one.text for one in wanted if isinstance(one, TextDelta))
    assert list(drive(chat(replace(ASKED, prediction=said, draft_tokens=4)), engines)) == wanted
    assert not engines["draft"].calls
    assert list(drive(chat(replace(ASKED, lookup_tokens=4, draft_tokens=4)), engines)) == wanted
    assert engines["draft"].calls, "where nothing is found"


def test_guesses_end_where_they_are_unlikely_or_an_answer_does() -> None:
    logits = np.log(np.array([[0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32))
    assert 0.8 * 0.6 > LEAST > 0.8 * 0.6 * 0.5
    assert Draft(4).sure(logits) == [1, 1] and Draft(4).sure(logits[3:]) == [2]
    assert Draft(4, never=(2,)).sure(logits[[1, 3, 1]]) == [1] and Draft(4, never=(1,)).sure(logits) == []
    assert Draft(4).sure(np.full((4, 3), np.nan, np.float32)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft_tokens": 17}, "draft_tokens"),
        ({"draft_tokens": -1}, "draft_tokens"),
        ({"draft_tokens": 2, "beams": 3}, "draft_tokens: does not go with 3 beams: send beams 1"),
    ],
)
def test_bad_requests_are_named_before_any_call(chat: ChatPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        chat(replace(ASKED, **change))


def test_a_model_without_a_draft_says_so(chat: ChatPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "config", tiny.CONFIG)
    with pytest.raises(InvalidInput, match="draft_tokens: needs a draft, which this model was built without"):
        chat(replace(ASKED, draft_tokens=1))


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def model(drafted_bundle: Path, request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    with closing(load_model(drafted_bundle, request.param)) as loaded:
        yield loaded


def asked(number: int, **settings: Any) -> ChatRequest:
    """A held-out picture to describe."""
    case = draw_questions(number + 1, seed=3, kinds=("caption",))[number]
    return ChatRequest((Message("user", (case.picture, case.question)),), **settings)


def ends(events: Any) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def test_the_sample_is_guessed_right_mostly(model: LoadedModel) -> None:
    """Greedily and drawn, the same answers in less than 0.5 of the calls."""
    tokens = accepted = 0
    for number, settings in enumerate(({}, {"temperature": 1.0, "seed": 4, "answers": 2}, {"lookup_tokens": 4})):
        request = asked(number, max_tokens=40, **settings)
        wanted, found = (
            list(drive(model.pipeline(replace(request, draft_tokens=count)), model.engines)) for count in (0, 6)
        )
        assert found == wanted and ends(found)
        tokens += sum(end.completion_tokens for end in ends(found))
        accepted += sum(end.accepted_tokens for end in ends(found))
    assert accepted > 0.5 * tokens


def test_requests_guess_in_the_same_runs(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what it gets alone and without guesses, also where only some of them guess."""
    requests = [asked(number, max_tokens=20) for number in range(3)]
    alone = [text(list(Job(model, model.pipeline(request)).events())) for request in requests]
    verified, run_many = list[int](), type(model.engines["decoder"]).run_many

    def counted(self: Engine, several: list[SlotCall]) -> list[dict[str, Array]]:
        verified.append(sum(call.last > 1 for call in several))
        return run_many(self, several)

    monkeypatch.setattr(type(model.engines["decoder"]), "run_many", counted)
    monkeypatch.setattr(batches, "CHUNK", 64)
    guessed = [replace(request, draft_tokens=count) for request, count in zip(requests, (3, 6, 0), strict=True)]
    found = together(model, *map(model.pipeline, guessed))
    assert [text(events) for events in found] == alone
    first, second, third = (end for events in found for end in ends(events))
    assert first.accepted_tokens > 2 and second.accepted_tokens > 2 and not third.guessed_tokens
    assert max(verified) == 2, "guesses of two requests were verified in one run"
