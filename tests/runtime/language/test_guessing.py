"""Guesses of the next tokens change no answer, whatever rules choose its tokens, and spare calls of the decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest

from runtime.bundle.signature import Array
from runtime.engine import FakeEngine, Slot
from runtime.errors import InvalidInput
from runtime.language.choice import choose
from runtime.language.decoder import Conversation, decode_tokens
from runtime.language.grammar import Grammar
from runtime.language.guessing import Guessing, Lookup
from runtime.language.processors import Scores, softmax
from runtime.language.sampling import Rules, Sampling
from runtime.language.text import Message
from runtime.pipeline import Pipeline, Room, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatDefaults, ChatRequest, Finished, TextDelta
from tests.runtime.pipelines import test_chat as tiny


def test_what_stood_behind_the_last_tokens_is_guessed() -> None:
    text = Lookup([1, 2, 3, 4, 5, 1, 2])
    assert text.guess(3) == [3, 4, 5] and text.guess(9) == [3, 4, 5, 1, 2, 3, 4, 5, 1]
    text.push(9)
    assert text.guess(3) == [], "2 9 is new"
    for token in (3, 4, 7, 8, 3, 4):
        text.push(token)
    assert text.guess(2) == [7, 8], "the last place counts, where as many tokens stand before both"
    assert Lookup([1, 2, 3, 4, 6, 3, 4, 8, 1, 2, 3, 4]).guess(1) == [6], "more tokens in common"
    assert Lookup([7, 7, 7]).guess(4) == [7, 7, 7, 7], "a repetition is expected to go on"


def test_a_prediction_is_guessed_from_its_beginning() -> None:
    text = Lookup([5, 6, 7, 8, 9], prediction=[1, 2, 3, 6, 7])
    assert text.guess(2) == [1, 2], "it is expected behind the prompt"
    fork = text.fork()
    for token in (1, 4, 2, 3):
        text.push(token)
    assert text.guess(3) == [6, 7, 5], "and goes on behind what it has in common with the answer"
    assert fork.guess(2) == [1, 2], "another answer begins anew"


def test_what_no_answer_goes_on_behind_is_not_guessed() -> None:
    tokens = [1, 2, 3, 0, 4, 1, 2]
    assert Lookup(tokens, never=(0,)).guess(4) == [3]
    assert Lookup(tokens, never=(3,)).guess(4) == Lookup([]).guess(4) == Lookup([5]).guess(4) == []
    assert Lookup(tokens).guess(0) == []


VOCABULARY = tiny.CONFIG.vocab_size
TABLE = (np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)) * 3).astype(np.float32)
TABLE[:, ~np.isin(np.arange(VOCABULARY), range(70, 80))] -= 9
"""It writes ten different tokens mostly, so it repeats itself."""


class Toy(FakeEngine):
    """A decoder whose logits follow from the last two positions in its slot. `positions` are those of each call."""

    def __init__(self, table: Scores = TABLE) -> None:
        super().__init__(lambda inputs: {})
        self.table, self.positions = table, list[int]()
        self.slots = WeakKeyDictionary[Slot, list[int]]()

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        return self.run_last(inputs, slot or Slot(), 1)

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        held, tokens = self.slots.setdefault(slot, []), inputs["inputs_embeds"][0, :, 0].astype(int).tolist()
        assert inputs["attention_mask"].shape == (1, len(held) + len(tokens))
        assert inputs["position_ids"].tolist() == [[*range(len(held), len(held) + len(tokens))]]
        assert len(held) + len(tokens) < tiny.CONTEXT
        before = [*held[-1:], *tokens]
        rows = [(now + 7 * last) % len(self.table) for last, now in zip([0, *before], before, strict=False)]
        held += tokens
        self.positions.append(len(tokens))
        return {"logits": self.table[rows[-count:]][None]}

    def copy(self, slot: Slot, to: Slot) -> None:
        self.slots[to] = list(self.slots[slot])

    def trim(self, slot: Slot, length: int) -> None:
        del self.slots[slot][length:]


def embedded(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"inputs_embeds": np.repeat(inputs["input_ids"][..., None], 32, -1).astype(np.float32)}


def seen(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"image_features": np.ones((len(inputs["pixel_values"]), tiny.TOKENS, 32), np.float32)}


SMALL = np.log(np.random.default_rng(0).dirichlet(np.ones(4), 4)).astype(np.float32)
"""Logits of the tokens behind each of four rows."""
PROMPT = (0, 1, 2, 3, 0, 1, 1, 2, 0, 3, 3, 1, 0, 0, 2, 2, 1, 3, 2, 3, 0, 1)


def written(length: int, sampling: Sampling, seed: int, count: int, toy: Toy) -> list[int]:
    """An answer of so many tokens, at most 4 different ones, to PROMPT."""
    tokens, rng, conversation = list(PROMPT), np.random.default_rng(seed), Conversation()
    guessing = Guessing(conversation, count, Lookup(PROMPT))

    def run() -> Pipeline:
        logits = (yield from decode_tokens(PROMPT, conversation))[-1]
        for left in range(length - 1, -1, -1):
            tokens.append(choose(logits, tokens, sampling, rng))
            if left:
                logits = yield from guessing.feed(tokens[-1], left)
        guessing.forget()

    assert not list(drive(run(), {"token_embedding": FakeEngine(embedded), "decoder": toy}))
    assert conversation.held == tokens[:-1] == toy.slots[conversation.slot][: len(conversation.held)]
    return tokens[len(PROMPT) :]


def test_drawn_tokens_are_distributed_as_the_decoder_says() -> None:
    """Chi-square over the answers of three tokens: 2,500 seeds, beside the exact probabilities."""
    draws, sampling, toy = 2_500, Sampling(temperature=1.5, top_k=3), Toy(SMALL)
    found = Counter(tuple(written(3, sampling, seed, 4, toy)) for seed in range(draws))
    shares = np.zeros((4, 4))
    for row, logits in enumerate(SMALL.astype(np.float64) / 1.5):
        best = np.argsort(-logits)[:3]
        shares[row, best] = softmax(logits[best])
    expected = {
        answer: draws * float(np.prod([
            shares[(now + 7 * last) % 4, token]
            for last, now, token in zip((*PROMPT[-2:], *answer), (PROMPT[-1], *answer), answer, strict=False)
        ]))
        for answer in product(range(4), repeat=3)
    }  # fmt: skip
    possible = {answer for answer, count in expected.items() if count}
    assert set(found) <= possible and sum(count > 1 for count in toy.positions) > 1.5 * draws, "there were guesses"
    square = sum((found[answer] - expected[answer]) ** 2 / expected[answer] for answer in possible)
    freedom = len(possible) - 1
    assert square < freedom + 3.5 * np.sqrt(2 * freedom), "1 in 1,000 of right ones would be further away"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(0.7, repetition_penalty=1.4)])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_equal_seeds_give_equal_tokens_in_fewer_calls(sampling: Sampling, count: int) -> None:
    for seed in range(8):
        plain, guessed = Toy(SMALL), Toy(SMALL)
        assert written(40, sampling, seed, count, guessed) == written(40, sampling, seed, 0, plain)
        assert plain.positions[1:] == [1] * 39 and max(guessed.positions[1:]) == count + 1
        assert len(guessed.positions) < len(plain.positions)


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return {"vision_encoder": FakeEngine(seen), "token_embedding": FakeEngine(embedded), "decoder": Toy()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny.write_bundle(folder, tiny.build_processor(), tiny.CONFIG.model_dump())
    return folder


@pytest.fixture
def chat(root: Path) -> ChatPipeline:
    return ChatPipeline(root, tiny.CONFIG.model_dump())


def calls(engines: Mapping[str, FakeEngine]) -> list[int]:
    """The positions of the decoder's calls since the last time."""
    decoder = engines["decoder"]
    assert isinstance(decoder, Toy)
    found, decoder.positions = decoder.positions, []
    return found


REPEATED = tiny.user("say it again: to be or not to be, to be or not to be")
DRAWN = {"temperature": 0.3, "seed": 3, "answers": 2, "top_p": 0.9}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.2, "logprobs": 3},
        {"frequency_penalty": 0.4, "presence_penalty": -0.3},
        DRAWN,
        {**DRAWN, "logprobs": 1, "min_p": 0.01, "top_k": 40},
        {"grammar": Grammar.regex("(to be, |or not ){5}")},
        {**DRAWN, "grammar": Grammar.regex("(ab)*c"), "temperature": 2.0},
        {"stop": ("\n",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("shown", [True, False])
def test_answers_are_the_same(
    chat: ChatPipeline, engines: dict[str, FakeEngine], settings: dict[str, Any], shown: bool
) -> None:
    """Texts, their pieces, log probabilities, ends and counts: all events."""
    first = (tiny.user(tiny.picture(0), "what?"), Message("assistant", ("a cat",))) if shown else ()
    request = ChatRequest((*first, REPEATED), **{"max_tokens": 60, **settings})
    wanted = list(drive(chat(request), engines))
    steps = calls(engines)
    for count in (1, 4, 16):
        guessed = list(drive(chat(replace(request, lookup_tokens=count)), engines))
        assert guessed == wanted
        ends = [event for event in guessed if isinstance(event, Finished)]
        made = calls(engines)
        assert len(made) == len(steps) - sum(end.accepted_tokens for end in ends)
        assert sum(made) == sum(steps) + sum(end.guessed_tokens - end.accepted_tokens for end in ends)
        assert max(made[1:], default=0) <= count + 1
    assert all(end.accepted_tokens <= end.guessed_tokens for end in ends)
    if "grammar" not in settings or not settings.get("temperature"):
        assert sum(end.accepted_tokens for end in ends) > 2


def test_a_right_prediction_spares_most_calls(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    """A wrong one changes nothing either."""
    request = ChatRequest((tiny.user("say"),), max_tokens=40, temperature=1.0, seed=9)
    wanted = list(drive(chat(request), engines))
    said = "".join(one.text for one in wanted if isinstance(one, TextDelta))
    calls(engines)
    assert list(drive(chat(replace(request, prediction=said)), engines)) == wanted
    right = calls(engines)
    assert len(right) == 1 + 8 and max(right[1:]) == 1 + 4, "the prompt, then 5 tokens a call"
    assert list(drive(chat(replace(request, prediction="no, " * 9, lookup_tokens=9)), engines)) == wanted
    assert list(drive(chat(replace(request, prediction=said, lookup_tokens=0)), engines)) == wanted
    assert max(calls(engines)[-39:]) == 1


def test_rules_hold_at_every_verified_position(
    chat: ChatPipeline, engines: dict[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules that look at lengths and at what was said: an early end, a forced one, words and their repetition."""
    rules = Rules(min_new_tokens=9, forced_eos_token_id=(tiny.EOS,), no_repeat_ngram_size=5, bad_words_ids=((9, 12),))
    monkeypatch.setattr(chat, "config", chat.config.model_copy(update={"defaults": ChatDefaults(rules=rules)}))
    for temperature in (0.0, 0.5):
        request = ChatRequest((REPEATED,), max_tokens=50, temperature=temperature, seed=1)
        wanted = list(drive(chat(request), engines))
        found = list(drive(chat(replace(request, lookup_tokens=8)), engines))
        end = found[-1]
        assert found == wanted and isinstance(end, Finished) and end.guessed_tokens


def test_a_conversation_goes_on_behind_what_was_accepted(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    """The next turn, a request that begins alike, and one behind an answer that was stopped within a call."""
    request = ChatRequest((REPEATED,), max_tokens=30, lookup_tokens=7)
    conversation = Conversation()
    events = list(drive(chat(request, conversation), engines))
    said, end = "".join(one.text for one in events if isinstance(one, TextDelta)), events[-1]
    assert isinstance(end, Finished) and end.accepted_tokens
    assert len(conversation.held) == end.prompt_tokens + end.completion_tokens - 1
    further = ChatRequest((REPEATED, Message("assistant", (said,)), tiny.user("and?")), max_tokens=20)
    wanted = list(drive(chat(further), engines))
    assert list(drive(chat(replace(further, lookup_tokens=7), conversation), engines)) == wanted
    chat.remember(Room(prefixes=1 << 20, position=1))
    stopped = drive(chat(request), engines)
    for _ in range(12):
        next(stopped)
    stopped.close()
    again = list(drive(chat(replace(further, lookup_tokens=3)), engines))
    assert again == wanted and isinstance(again[-1], Finished) and again[-1].reused_tokens >= end.prompt_tokens


def test_the_length_of_an_answer_bounds_its_guesses(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    """The toy takes no call that goes beyond the model's context."""
    request = ChatRequest((REPEATED,), max_tokens=None, lookup_tokens=16)
    room = tiny.CONTEXT - len(chat.prompt(request).ids)
    events = list(drive(chat(replace(request, max_tokens=room)), engines))
    assert isinstance(events[-1], Finished) and events[-1].completion_tokens == room


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lookup_tokens": 17}, "lookup_tokens"),
        ({"lookup_tokens": -1}, "lookup_tokens"),
        ({"lookup_tokens": 2, "beams": 3}, "lookup_tokens: does not go with 3 beams: send beams 1"),
        ({"prediction": "a", "beams": 3}, "prediction: does not go with 3 beams: send beams 1"),
        ({"prediction": "a" * 100_001}, "prediction"),
    ],
)
def test_bad_requests_are_named_before_any_call(chat: ChatPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        chat(ChatRequest((REPEATED,), **change))


def test_counts_are_those_of_all_answers() -> None:
    first, second = (Finished("stop", 7, 3, answer=n, guessed_tokens=5, accepted_tokens=2) for n in range(2))
    assert first.counts == {"prompt_tokens": 7, "guessed_tokens": 5, "accepted_tokens": 2}
    assert second.counts == {"guessed_tokens": 5, "accepted_tokens": 2}
    assert Finished("stop", 7, 3, answer=1).counts == {}


def test_a_prediction_is_unicode() -> None:
    with pytest.raises(InvalidInput, match="prediction: holds half a surrogate pair"):
        ChatRequest((Message("user", ("a",)),), prediction="a\ud800")
