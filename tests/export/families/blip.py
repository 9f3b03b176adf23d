"""Tiny BLIP-2 and InstructBLIP checkpoints of any language model, as transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from export.checkpoint.source import resolve
from export.family import family_of
from runtime.language.text import Message
from runtime.pipeline import pipelines
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatRequest
from tests.export.families.conftest import PICTURE

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-vlm"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
QUERIES, EDGE = 6, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *"?:.,"]
"""The vocabulary of a Q-Former that reads texts."""
TOKENS = {"vocab_size": 520, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
OPT = {"model_type": "opt", **SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 1024}
LLAMA = {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512}
T5 = {
    "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 3,
    "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40,
}  # fmt: skip


def save(folder: Path, text: Mapping[str, Any] = OPT, image_token: int | None = 4, **top: Any) -> Path:
    """A BLIP-2 of three layers and random float16 weights, large enough that answers vary. Without `image_token`, it is
    one of the older checkpoints, whose tokenizer has no placeholder either.
    """
    config = _config(text, image_token, {"vocab_size": 32}, top)
    _save_model(folder, Blip2ForConditionalGeneration(Blip2Config.from_dict(config)), image_token)
    return folder


def save_instruct(folder: Path, text: Mapping[str, Any] = LLAMA, image_token: int | None = 4, **top: Any) -> Path:
    """The same of an InstructBLIP, with a tokenizer of letters for the Q-Former."""
    qformer = {"vocab_size": len(WORDS), "max_position_embeddings": 96}
    config = _config(text, image_token, qformer, top)
    _save_model(folder, InstructBlipForConditionalGeneration(InstructBlipConfig.from_dict(config)), image_token)
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "qformer_tokenizer" / "vocab.txt")).save_pretrained(folder / "qformer_tokenizer")
    return folder


def _config(
    text: Mapping[str, Any], image_token: int | None, qformer: Mapping[str, Any], top: Mapping[str, Any]
) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "vision_config": SMALL | {"image_size": EDGE, "patch_size": 8},
        "qformer_config": SMALL | dict(qformer),
        "text_config": {**TOKENS, **text},
        "num_query_tokens": QUERIES,
        "image_token_index": image_token,
        **top,
    }


def randomize(model: Any) -> None:
    """Weights large enough that results vary. T5 does not scale the scores of its attention: the weights of its
    queries are smaller by that factor, as the library initializes them, and those of its positions larger.
    """
    scales = {"Attention.q.weight": T5["d_kv"] ** -0.5, "relative_attention_bias.weight": 4.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = next((scale for end, scale in scales.items() if name.endswith(end)), 1.0)
                parameter.copy_(torch.randn_like(parameter) * scale * (0.1 if "vision" in name else 0.2))


def _save_model(folder: Path, model: Any, image_token: int | None) -> None:
    randomize(model)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = (SAMPLE / name).read_text()
        (folder / name).write_text(file if image_token else file.replace("<image>", "<other>"))
    BlipImageProcessor(size={"height": EDGE, "width": EDGE}).save_pretrained(folder)


@cache
def library(source: Path) -> tuple[Any, Any]:
    """The library's own model in float32, and its processor."""
    tokenizer, pictures = AutoTokenizer.from_pretrained(source), BlipImageProcessor.from_pretrained(source)
    (architecture,) = json.loads((source / "config.json").read_bytes())["architectures"]
    model = getattr(transformers, architecture).from_pretrained(source, dtype="float32").eval()
    if not (source / "qformer_tokenizer").is_dir():
        return model, Blip2Processor(pictures, tokenizer, num_query_tokens=QUERIES)
    qformer = AutoTokenizer.from_pretrained(source / "qformer_tokenizer")
    return model, InstructBlipProcessor(pictures, tokenizer, qformer, num_query_tokens=QUERIES)


def library_answer(source: Path, text: str, **settings: Any) -> tuple[list[int], list[int]]:
    """The prompt and the tokens of transformers' own generate."""
    prompt, answers = library_answers(source, text, **settings)
    return prompt, answers[0]


def library_answers(source: Path, text: str, **settings: Any) -> tuple[list[int], list[list[int]]]:
    """The prompt and the tokens of all answers, padded to one length."""
    model, processor = library(source)
    given = processor(images=Image.fromarray(PICTURE), text=text, return_tensors="pt")
    model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    with torch.inference_mode():
        found = model.generate(**given, do_sample=False, **settings)
    prompt = given["input_ids"][0].tolist()
    start = 1 if model.config.text_config.is_encoder_decoder else len(prompt)
    return prompt, found[:, start:].tolist()


def ask(text: str, **settings: Any) -> ChatRequest:
    return ChatRequest((Message("user", (PICTURE, text)),), temperature=0.0, **settings)


def opened(source: Path, root: Path) -> ChatPipeline:
    """The pipeline of a checkpoint that is not built."""
    found = resolve(str(source))
    family = family_of(found)
    for path, file in family.assets(found).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / path)
    pipeline = pipelines()[family.pipeline_of(found)].open(root, family.config(found))
    assert isinstance(pipeline, ChatPipeline)
    return pipeline
