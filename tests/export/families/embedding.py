"""Tiny checkpoints of models that embed, as transformers saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
)

from tests.export.families.blip import EDGE, OPT, QUERIES, SMALL, TOKENS, WORDS, randomize

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-diffusion"
WIDTH = 24


def save_clip(folder: Path) -> Path:
    """A CLIP of three layers and random float16 weights."""
    torch.manual_seed(0)
    tokens = json.loads((SAMPLE / "text_encoder" / "config.json").read_bytes())
    names = "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"
    text = SMALL | {name: tokens[name] for name in names}
    vision = SMALL | {"image_size": EDGE, "patch_size": 8}
    model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    randomize(model)
    model.half().save_pretrained(folder)
    shutil.copytree(SAMPLE / "tokenizer", folder, dirs_exist_ok=True)
    size = {"height": EDGE, "width": EDGE}
    CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=size).save_pretrained(folder)
    return folder


def save_retrieval(folder: Path, image_token: int | None = None) -> Path:
    """A BLIP-2 of three layers and random float16 weights that embeds and matches."""
    torch.manual_seed(0)
    qformer = SMALL | {"vocab_size": len(WORDS), "max_position_embeddings": 96, "use_qformer_text_input": True}
    config = Blip2Config.from_dict(
        {
            "vision_config": SMALL | {"image_size": EDGE, "patch_size": 8},
            "qformer_config": qformer,
            "text_config": {**TOKENS, **OPT},
            "num_query_tokens": QUERIES,
            "image_text_hidden_size": WIDTH,
            "image_token_index": image_token,
        }
    )
    model: Any = Blip2ForImageTextRetrieval(config)
    randomize(model)
    model.half().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BlipImageProcessor(size={"height": EDGE, "width": EDGE}).save_pretrained(folder)
    return folder
