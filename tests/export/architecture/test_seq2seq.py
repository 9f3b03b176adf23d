"""An encoder and a decoder compute what transformers' own T5 computes, call after call."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BartConfig, T5Config, T5ForConditionalGeneration

from export.architecture import seq2seq
from runtime.errors import UnsupportedModel

SMALL: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    ],
    ids=["flan", "first"],
)
@torch.inference_mode()
def test_outputs_and_caches_are_the_library_s(settings: dict[str, Any]) -> None:
    """The second one scales what its head gets. Calls go beyond the distances with buckets of their own."""
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(T5Config(**SMALL, **settings)).eval()
    embeds = torch.randn(2, 37, 32)
    given, expected = seq2seq.TextEncoder(model)(embeds), seq2seq.library_encoder(model)(embeds)
    pairs = list(zip(given, expected, strict=True))
    decoder, library = seq2seq.BiasedDecoder(model), seq2seq.library_decoder(model)
    got = wanted = [torch.zeros(2, 4, 0, 8)] * 6
    past = 0
    for count in (3, 140, 1, 5, 1):
        mask, positions = torch.ones(2, past + count, dtype=torch.int64), torch.arange(past, past + count)
        inputs = torch.randn(2, count, 32), mask, positions[None].expand(2, -1), *given
        (logits, *got), (others, *wanted) = decoder(*inputs, *got), library(*inputs, *wanted)
        pairs += zip((logits, *got), (others, *wanted), strict=True)
        past += count
    assert max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs) < 1e-5


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_is_not_tied(own: bool) -> None:
    model: Any = SimpleNamespace(language_model=T5ForConditionalGeneration(T5Config(**SMALL)))
    name = "language_model.lm_head.weight"
    model.all_tied_weights_keys = {name: "language_model.shared.weight"}
    source: Any = SimpleNamespace(open=lambda: SimpleNamespace(tensors={name} if own else set()))
    seq2seq.untie(model, source)
    tied = model.language_model.lm_head.weight is model.language_model.shared.weight
    assert tied is not own and (name in model.all_tied_weights_keys) is not own


def test_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"text_config.model_type\) is a bart, expected one of t5"):
        seq2seq.require_known(Path("config.json"), BartConfig())


def test_the_decoder_begins_as_the_config_says() -> None:
    assert seq2seq.start_token(T5Config(pad_token_id=3)) == 3
    assert seq2seq.start_token(T5Config(pad_token_id=3, decoder_start_token_id=0)) == 0
