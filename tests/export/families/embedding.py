"""Tiny checkpoints of models that embed, as transformers saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
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


def save_siglip(folder: Path) -> Path:
    """A SigLIP of three layers and random float16 weights, with a SentencePiece tokenizer of few pieces and the
    tokenizer.json that such models are published with.
    """
    torch.manual_seed(0)
    pieces = _save_pieces(folder)
    text = SMALL | {"vocab_size": pieces + 3, "max_position_embeddings": 112, "projection_size": SMALL["hidden_size"],
        "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = SMALL | {"image_size": EDGE, "patch_size": 8}
    model: Any = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    randomize(model)
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.5)
    model.half().save_pretrained(folder)
    SiglipImageProcessor(size={"height": EDGE, "width": EDGE}).save_pretrained(folder)
    return folder


def _save_pieces(folder: Path) -> int:
    """The files of a SigLIP's tokenizer; how many pieces it has."""
    folder.mkdir(parents=True)
    texts = iter(["a red circle on the left of a blue square", "two dogs and a fox in the snow", "xyz qjkv pmw"] * 20)
    trainer: Any = spm.SentencePieceTrainer
    trainer.train(
        sentence_iterator=texts, model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, normalization_rule_name="identity",
    )  # fmt: skip
    model: Any = spm.SentencePieceProcessor(str(folder / "spiece.model"))
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer: Any = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[!-/:-@\\[-`{-~]"), ""),
            normalizers.Replace(Regex("\\s+"), " "), normalizers.Strip()]
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "unk_token": "<unk>", "eos_token": "</s>",
        "model_max_length": 112}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


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
