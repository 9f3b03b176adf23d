"""InstructBLIP: BLIP-2 whose Q-Former reads the instruction, too (Dai et al. 2023, arXiv:2305.06500).

The instruction's tokens, of the Q-Former's own tokenizer, go into it behind the learned queries, so that the queries
find what the instruction is about. The language model is Vicuna (Llama) or Flan-T5, as in the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from export.architecture.qformer import QFormerFamily, image_embeds, image_features
from export.checkpoint.source import Source
from export.checkpoint.tokenizer import tokenizer_file
from export.family import Component, Part, Reference
from runtime.bundle.signature import Dim, Signature, Tensor
from runtime.language.instruction import FOLDER, INPUT, InstructionConfig
from runtime.language.vision import TILES

DECODERS: Final = ("llama",)
CAPTION: Final = "A short image description."
"""What a picture alone stands for: one of the instructions for captions that the model was trained with."""
USUAL: Final = 16
"""Tokens of an instruction that targets with fixed lengths prepare for first."""


class InstructedQFormer(nn.Module):
    """Q-Former and projection: image_embeds [images, patches, hidden] and the instruction's tokens instruction_ids
    [images, instruction] to image_features [images, queries, hidden of the language model].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.query_tokens, self.qformer, self.projection = model.query_tokens, model.qformer, model.language_projection

    def forward(self, image_embeds: TorchTensor, instruction_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        count = queries.shape[1]
        found = self.qformer.encoder(  # the model's own forward makes a mask that hides nothing
            self.qformer.embeddings(input_ids=instruction_ids, query_embeds=queries),
            encoder_hidden_states=image_embeds,
            query_length=count,
        )
        return (self.projection(found.last_hidden_state[:, :count]),)


def qformer_part(component: Component) -> Part:
    model: Any = component.model
    qformer, images = model.config.qformer_config, Dim(name="images", min=1, opt=1, max=TILES)
    longest = qformer.max_position_embeddings
    tokens = Dim(name="instruction", min=1, opt=min(USUAL, longest), max=longest)
    ids = Tensor(name=INPUT, dtype="int64", dims=(images, tokens), values="below", limit=qformer.vocab_size)
    signature = Signature(inputs=(image_embeds(model, images), ids), outputs=(image_features(model, images),))
    return Part("qformer", (component,), InstructedQFormer(model), _query(model), signature)


def _query(model: Any) -> Reference:
    """The steps of the library's `get_image_features` behind the vision model."""

    def reference(image_embeds: TorchTensor, instruction_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        queries = model.query_tokens.expand(image_embeds.shape[0], -1, -1)
        count = queries.shape[1]
        found = model.qformer(
            input_ids=instruction_ids,
            attention_mask=torch.ones(len(queries), count + instruction_ids.shape[1], dtype=torch.int64),
            query_embeds=queries,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.int64),
        )
        return (model.language_projection(found.last_hidden_state[:, :count]),)

    return reference


def settings(config: Any) -> Mapping[str, Any]:
    qformer = config.qformer_config
    return {
        "caption": CAPTION,
        "instruction": InstructionConfig(length=qformer.max_position_embeddings, vocab_size=qformer.vocab_size),
    }


def files(source: Source) -> Mapping[str, Path]:
    return {f"{FOLDER}/tokenizer.json": tokenizer_file(source.root / FOLDER)}


FAMILY = QFormerFamily(
    "instructblip", InstructBlipForConditionalGeneration, InstructBlipConfig, DECODERS, qformer_part, settings, files
).family
