"""Tiny BLIP-2 checkpoints of any language model, as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-vlm"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
QUERIES, EDGE = 6, 24
TOKENS = {"vocab_size": 520, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
OPT = {"model_type": "opt", **SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 1024}
T5 = {
    "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 3,
    "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40,
}  # fmt: skip


def save(folder: Path, text: Mapping[str, Any] = OPT, image_token: int | None = 4, **top: Any) -> Path:
    """A BLIP-2 of three layers and random float16 weights, large enough that answers vary. Without `image_token`, it is
    one of the older checkpoints, whose tokenizer has no placeholder either.
    """
    torch.manual_seed(0)
    config = Blip2Config.from_dict(
        {
            "vision_config": SMALL | {"image_size": EDGE, "patch_size": 8},
            "qformer_config": SMALL | {"vocab_size": 32},
            "text_config": {**TOKENS, **text},
            "num_query_tokens": QUERIES,
            "image_token_index": image_token,
            **top,
        }
    )
    model: Any = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if "vision" in name else 0.2))
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = (SAMPLE / name).read_text()
        (folder / name).write_text(file if image_token else file.replace("<image>", "<other>"))
    BlipImageProcessor(size={"height": EDGE, "width": EDGE}).save_pretrained(folder)
    return folder
