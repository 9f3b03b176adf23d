"""Beam search answers as transformers' generate does, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from runtime.engine import Slot
from runtime.errors import EngineError
from runtime.language.beams import Beams, BeamSearch, search
from runtime.language.decoder import Conversation, decode, embed
from runtime.language.processors import Scores
from runtime.language.sampling import Bounds, Rules, Sampling
from runtime.pipeline import Call, Outputs

VOCABULARY, PROMPT = 24, (5, 9, 13, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama whose answers vary and end."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    found: Any = LlamaForCausalLM(config).eval()
    found.generation_config.eos_token_id = None  # generate would take it where a case has none
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Decoder:
    """Answers calls from the whole sequence of a slot: what a slot was forked from, and the tokens since."""

    def __init__(self, model: Any) -> None:
        self.model, self.held, self.copies = model, dict[Slot, list[int]](), 0

    @torch.inference_mode()
    def __call__(self, call: Call) -> Outputs:
        if call.submodel == "token_embedding":
            return {"inputs_embeds": np.repeat(call.inputs["input_ids"][..., None], 2, -1).astype(np.float32)}
        assert call.slot is not None
        if call.origin is not None:
            assert call.slot not in self.held
            self.held[call.slot], self.copies = list(self.held[call.origin]), self.copies + 1
        tokens = self.held.setdefault(call.slot, [])
        tokens += call.inputs["inputs_embeds"][0, :, 0].astype(int).tolist()
        assert call.inputs["attention_mask"].shape == (1, len(tokens))
        return {"logits": self.model(torch.tensor([tokens])).logits[:, -1:].numpy()}


def answers(model: Any, beams: Beams, sampling: Sampling, bounds: Bounds, stopped: Any = None) -> list[list[int]]:
    decoder = Decoder(model)

    def pipeline() -> Iterator[Any]:
        conversation = Conversation()
        (logits,) = yield from decode((yield from embed(PROMPT)), PROMPT, conversation)
        state = BeamSearch(PROMPT, bounds, sampling, beams, *([stopped] if stopped else []))
        found = yield from search(state, conversation, logits)
        assert decoder.held[conversation.slot] == conversation.held == list(PROMPT)
        return found

    running = pipeline()
    outputs: Outputs | None = None
    while True:
        try:
            outputs = decoder(running.send(outputs))  # type: ignore[attr-defined]
        except StopIteration as stop:
            return [list(tokens) for tokens in stop.value]


def expected(model: Any, beams: Beams, ends: tuple[int, ...], new: int, count: int, **settings: Any) -> list[list[int]]:
    ids = torch.tensor([PROMPT])
    config = GenerationConfig(
        num_beams=beams.count, length_penalty=beams.length_penalty, early_stopping=beams.early_stopping,
        renormalize_logits=beams.renormalize, eos_token_id=list(ends) or None, pad_token_id=0,
        max_length=len(PROMPT) + new, num_return_sequences=count, **settings,
    )  # fmt: skip
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [_ended(row[len(PROMPT) :].tolist(), ends) for row in found]


def _ended(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """Tokens up to the first end: what follows is padding."""
    places = [i for i, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens


Case = tuple[Beams, tuple[int, ...], int, dict[str, Any]]
CASES: dict[str, Case] = {
    "plain": (Beams(4), (2, 3), 16, {}),
    "early stopping": (Beams(4, early_stopping=True), (2, 3), 16, {}),
    "never": (Beams(3, early_stopping="never"), (11,), 24, {"repetition_penalty": 1.4}),
    "long answers": (Beams(4, 2.5), (1, 2, 3, 4, 5), 16, {}),
    "long answers, never": (Beams(4, 2.5, "never"), (1, 2, 3, 4, 5), 16, {}),
    "short answers": (Beams(3, -1.0), (11, 2), 16, {"no_repeat_ngram_size": 2}),
    "no length penalty": (Beams(6, 0.0, True), (2, 3), 12, {"min_length": 12}),
    "no end token": (Beams(2), (), 9, {}),
    "renormalized": (Beams(4, renormalize=True), (2, 3), 16, {"min_new_tokens": 6, "bad_words_ids": [[4], [8, 2]]}),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_equal_transformers(model: Any, name: str) -> None:
    """All of them, best first."""
    beams, ends, new, settings = CASES[name]
    rules = {key: value for key, value in settings.items() if key in Rules.model_fields}
    sampling = Sampling(repetition_penalty=settings.get("repetition_penalty", 1.0), rules=Rules(**rules))
    found = answers(model, beams, sampling, Bounds(len(PROMPT), len(PROMPT) + new, ends))
    assert found and found == expected(model, beams, ends, new, beams.count, **settings)[: len(found)]


def test_the_likeliest_is_not_the_greedy_answer(model: Any) -> None:
    """Else the comparisons above would prove nothing."""
    bounds = Bounds(len(PROMPT), len(PROMPT) + 16, (2, 3))
    one, four = (answers(model, Beams(count), Sampling(), bounds)[0] for count in (1, 4))
    assert one != four and one == expected(model, Beams(1), (2, 3), 16, 1)[0]


def test_an_answer_ends_where_it_is_stopped(model: Any) -> None:
    bounds = Bounds(len(PROMPT), len(PROMPT) + 16, ())
    free = answers(model, Beams(3), Sampling(), bounds)[0]
    for answer in answers(model, Beams(3, early_stopping=True), Sampling(), bounds, lambda tokens: len(tokens) == 5):
        assert len(answer) == 5
    assert len(free) == 16


def test_logits_that_are_not_numbers_are_an_engine_error() -> None:
    logits: Scores = np.full(VOCABULARY, np.nan, np.float32)
    with pytest.raises(EngineError, match="not numbers"):
        BeamSearch(PROMPT, Bounds(4, 9), Sampling(), Beams(2)).advance([logits] * 2)
