"""A prompt is encoded once, its keys and values go into every call, and lengths are refused before any."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.signature import Array
from runtime.engine import FakeEngine, Slot
from runtime.errors import BundleError, ContextLengthExceeded, InvalidInput
from runtime.language.decoder import Conversation
from runtime.language.text import Message
from runtime.language.vision import Prompt
from runtime.pipeline import drive
from runtime.pipelines.seq2seq import Seq2SeqPipeline
from runtime.tasks.chat import ChatRequest, Finished

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-vlm"
START, END, CONTEXT = 3, 2, 12
CONFIG: dict[str, Any] = {
    "context_length": CONTEXT, "vocab_size": 512, "hidden_size": 4, "bos_token_id": None, "eos_token_ids": [END],
    "prompt": "plain", "decoder_start_token_id": START,
}  # fmt: skip


@pytest.fixture
def pipeline(tmp_path: Path) -> Seq2SeqPipeline:
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(SAMPLE / "tokenizer.json", tmp_path / "tokenizer")
    return Seq2SeqPipeline.open(tmp_path, CONFIG)


def ask(text: str, **settings: Any) -> ChatRequest:
    return ChatRequest((Message("user", (text,)),), temperature=0.0, **settings)


def logits(inputs: Mapping[str, Array], last: int) -> dict[str, Array]:
    return {"logits": np.eye(512, dtype=np.float32)[inputs["inputs_embeds"][:, -last:, 0].astype(int) + 1]}


class Counting(FakeEngine):
    """A decoder that gives logits of several positions at once."""

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        self.calls.append(dict(inputs))
        return logits(inputs, count)


def engines() -> dict[str, FakeEngine]:
    """Each token is the one before and one; the keys of a prompt are its embeddings."""

    def embed(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"inputs_embeds": np.repeat(inputs["input_ids"][..., None], 4, -1).astype(np.float32)}

    return {
        "token_embedding": FakeEngine(embed),
        "text_encoder": FakeEngine(lambda inputs: {"encoder.0.key": np.array(inputs["inputs_embeds"])}),
        "decoder": Counting(lambda inputs: logits(inputs, 1)),
    }


def test_a_prompt_is_encoded_once(pipeline: Seq2SeqPipeline) -> None:
    fakes = engines()
    conversation = Conversation()
    for text in ("red", "blue circle"):  # nothing is kept for the next turn
        events = list(drive(pipeline(ask(text, max_tokens=4), conversation), fakes))
        ids = pipeline.text.tokenizer.encode(text).ids
        assert pipeline.prompt(ask(text)).ids == ids
        assert events[-1] == Finished("length", len(ids), 4)
        calls = fakes["decoder"].calls[-4:]
        assert [call["inputs_embeds"][0, 0, 0] for call in calls] == [START, START + 1, START + 2, START + 3]
        assert [call["attention_mask"].shape[1] for call in calls] == [1, 2, 3, 4]
        assert all(call["encoder.0.key"][0, :, 0].tolist() == ids for call in calls)
    assert len(fakes["text_encoder"].calls) == 2


def test_tokens_of_the_prompt_are_guessed(pipeline: Seq2SeqPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has not read them: they are looked up where the encoder read them."""
    ids, fakes = [9, 4, 5, 6, 7, 8], engines()
    monkeypatch.setattr(pipeline, "prompt", lambda request: Prompt(ids, ids, []))
    wanted = list(drive(pipeline(ask("red")), engines()))
    events = list(drive(pipeline(ask("red", lookup_tokens=3)), fakes))
    end = events[-1]
    assert events == wanted and isinstance(end, Finished) and (end.guessed_tokens, end.accepted_tokens) == (3, 3)
    assert [call["inputs_embeds"].shape[1] for call in fakes["decoder"].calls] == [1, 1, 4, 1, 1, 1, 1, 1]


def test_lengths_are_refused_before_any_call(pipeline: Seq2SeqPipeline) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"messages: the prompt has \d+ tokens .* the model reads 12"):
        pipeline(ask("a circle " * 9))
    with pytest.raises(ContextLengthExceeded, match=r"max_tokens: is 12, answers of the model have 11 tokens at most"):
        pipeline(ask("red", max_tokens=CONTEXT))
    events = list(drive(pipeline(ask("red")), engines()))
    assert isinstance(events[-1], Finished) and events[-1].completion_tokens == CONTEXT - 1


def test_pictures_are_not_pruned(pipeline: Seq2SeqPipeline) -> None:
    """Places in the prompt are not told to its encoder."""
    with pytest.raises(InvalidInput, match="picture_tokens: is of models without an encoder of prompts: leave it out"):
        pipeline(ask("red", picture_tokens=4))


def test_a_bundle_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="decoder_start_token_id"):
        Seq2SeqPipeline.open(tmp_path, {key: value for key, value in CONFIG.items() if key != "decoder_start_token_id"})
