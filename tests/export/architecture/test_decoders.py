"""Every decoder that is built computes what transformers' own model computes, call after call and beyond its window;
others are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, OPTConfig, OPTForCausalLM

from export.architecture.decoders import (
    DECODERS,
    LEARNED,
    STATIC,
    Decoder,
    library_decoder,
    reduced_decoder,
    require_known,
    windows,
)
from runtime.errors import SourceError, UnsupportedModel

WINDOW, CONTEXT = 12, 256
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LIMITED = {"sliding_window": WINDOW}
ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 32},
    "proportional": {"partial_rotary_factor": 0.5},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": LIMITED,
    "phi3": LIMITED | {"head_dim": None, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "qwen2": LIMITED | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": LIMITED | {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": LIMITED | {"use_sliding_window": True, "no_rope_layer_interval": 2},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "olmo": {"clip_qkv": 0.5},
    "cohere": {"use_qk_norm": True},
    "phi": {"qk_layernorm": True, "partial_rotary_factor": 0.5},
} | dict.fromkeys(("gemma3_text", "olmo3", "starcoder2", "cohere2", "ministral", "exaone4"), LIMITED)


def config_of(text: dict[str, Any]) -> LlavaConfig:
    given = {
        **SMALL,
        "vocab_size": 64,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **text,
    }
    found = {key: value for key, value in given.items() if value is not None}
    return LlavaConfig.from_dict({"vision_config": VISION, "text_config": found, "image_token_index": 4})


@torch.inference_mode()
def distance(text: dict[str, Any]) -> float:
    """The largest relative difference of any output of calls that leave the window, with a padded row."""
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config_of(text)).eval()
    return compared(model, model.model.language_model, model.config.text_config)


def compared(model: Any, decoder: Any, config: Any) -> float:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)
    ours, library = Decoder(decoder, model.lm_head, states=True), library_decoder(model, states=True)
    heads, size = (
        getattr(config, "num_key_value_heads", config.num_attention_heads),
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    got = wanted = [torch.zeros(2, heads, 0, size)] * (2 * config.num_hidden_layers)
    past, worst = 0, 0.0
    for count in (3, WINDOW + 2, 1, 5, 1):
        mask = torch.ones(2, past + count, dtype=torch.int64)
        mask[1, :2] = 0
        position = torch.arange(past, past + count)[None].expand(2, -1) + (CONTEXT - 64 if past > 2 * WINDOW else 0)
        inputs = torch.randn(2, count, config.hidden_size), mask, position
        (logits, hidden, *got), (expected, read, *wanted) = ours(*inputs, *got), library(*inputs, *wanted)
        for one, other in zip((logits, hidden, *got), (expected, read, *wanted), strict=True):
            worst = max(worst, float((one - other).abs().max() / other.abs().max()))
        past += count
    return worst


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_computes_what_the_library_computes(kind: str) -> None:
    text = {"model_type": kind} | SPECIAL.get(kind, {})
    assert distance(text) < 1e-5
    limited = any(windows(config_of(text).text_config))
    assert limited == ("sliding_window" in text), "the window counts in some layer"


@pytest.mark.parametrize("before", [True, False])
@torch.inference_mode()
def test_learned_positions(before: bool) -> None:
    """OPT, with layer norms in front of the layers and behind them."""
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
    config = OPTConfig(**small, vocab_size=64, ffn_dim=48, max_position_embeddings=CONTEXT, do_layer_norm_before=before)
    model: Any = OPTForCausalLM(config).eval()
    assert LEARNED == ("opt",) and compared(model, model.model, config) < 1e-5


@pytest.mark.parametrize("kind", STATIC)
def test_rotary_types_of_fixed_frequencies(kind: str) -> None:
    assert (
        distance({"model_type": "llama", "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | ROTARY[kind]})
        < 1e-5
    )


@pytest.mark.parametrize(
    "text",
    [
        {"attention_bias": True, "mlp_bias": True, "head_dim": 20, "num_key_value_heads": 1, "attention_dropout": 0.1},
        {"tie_word_embeddings": True, "hidden_act": "gelu_new", "num_key_value_heads": 4},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=["biases", "tied", "old-names"],
)
def test_other_settings_of_a_decoder(text: dict[str, Any]) -> None:
    assert distance({"model_type": "llama"} | text) < 1e-5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type 'dynamic'"),
        (
            {"model_type": "phi3", "head_dim": None, "num_key_value_heads": 4, "original_max_position_embeddings": 32,
                "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "of type 'longrope'",
        ),
        ({"model_type": "gemma2"}, "is a gemma2, expected one of"),
        ({"model_type": "stablelm"}, "is a stablelm, expected one of"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
            "of type 'su', which is not known"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected 1 or more"),
    ],
    ids=["dynamic", "longrope", "gemma2", "stablelm", "unknown", "no-window"],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(text: dict[str, Any], words: str) -> None:
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        require_known(Path("config.json"), config_of(text).text_config)
    assert words in str(caught.value)


def test_a_reduced_decoder_is_narrow() -> None:
    large = config_of(
        {"model_type": "llama", "vocab_size": 64064, "pad_token_id": 64000, "intermediate_size": 20480}
    ).text_config
    few = reduced_decoder(large)
    assert few["vocab_size"] == 4096 and few["pad_token_id"] == 4095 and few["intermediate_size"] == 4096
    small = config_of({"model_type": "llama", "vocab_size": 520, "pad_token_id": None}).text_config
    assert reduced_decoder(small)["vocab_size"] == 520 and reduced_decoder(small)["pad_token_id"] is None


def test_a_reduced_decoder_has_a_layer_of_each_kind() -> None:
    text = config_of({"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 100}).text_config
    few = reduced_decoder(text)
    assert few["num_hidden_layers"] == 2 and sorted(few["layer_types"]) == ["full_attention", "sliding_attention"]
    assert (
        few["sliding_window"] == 8
        and reduced_decoder(config_of({"model_type": "llama"}).text_config)["num_hidden_layers"] == 2
    )
