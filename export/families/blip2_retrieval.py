"""BLIP-2's first stage: embeddings of pictures and texts, and a network that says whether both belong together (Li et
al. 2023, arXiv:2301.12597). The Q-Former reads texts, too, with the learned queries or alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from export.architecture.configs import parsed
from export.architecture.qformer import (
    CONFIGS,
    ENCODERS,
    REDUCED,
    image_embeds,
    processors,
    require_vision,
    unit,
    vision_part,
)
from export.checkpoint.source import Source
from export.checkpoint.tokenizer import tokenizer_file
from export.family import Component, Family, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import UnsupportedModel
from runtime.language.vision import TILES
from runtime.pipelines.embed import EmbedConfig

USUAL: Final = 16
"""Tokens of a text that targets with fixed lengths prepare for first."""


class QFormer(nn.Module):
    """image_embeds [images, patches, hidden] to normalized image_features [images, queries, width]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.query_tokens, self.qformer, self.projection = model.query_tokens, model.qformer, model.vision_projection

    def forward(self, image_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        queries = self.qformer.layernorm(self.query_tokens).expand(image_embeds.shape[0], -1, -1)
        found = self.qformer.encoder(queries, encoder_hidden_states=image_embeds, query_length=queries.shape[1])
        return (unit(self.projection(found.last_hidden_state)),)


class TextEncoder(nn.Module):
    """input_ids [batch, sequence] to normalized text_embeds [batch, width], those of the first position."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embeddings, self.qformer, self.projection = model.embeddings, model.qformer, model.text_projection

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        found = self.qformer.encoder(self.qformer.layernorm(self.embeddings(input_ids)), query_length=0)
        return (unit(self.projection(found.last_hidden_state[:, 0])),)


class Matcher(nn.Module):
    """image_embeds [images, patches, hidden] and input_ids [images, sequence] to match_logits [images, 2]: that they do
    not belong together, and that they do.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.query_tokens, self.embeddings = model.query_tokens, model.embeddings
        self.qformer, self.head = model.qformer, model.itm_head

    def forward(self, image_embeds: TorchTensor, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        count = queries.shape[1]
        hidden = self.qformer.layernorm(self.embeddings(input_ids, query_embeds=queries))
        found = self.qformer.encoder(hidden, encoder_hidden_states=image_embeds, query_length=count)
        return (self.head(found.last_hidden_state[:, :count]).mean(dim=1),)


def _library(model: Any) -> Callable[..., Any]:
    """The library's own forward on what its vision model gives, and tokens."""

    def forward(seen: TorchTensor, ids: TorchTensor, **options: Any) -> Any:
        if model.config.image_token_index is not None:  # then a text has the placeholders of the queries in front
            ids = torch.cat([ids.new_zeros(len(ids), model.config.num_query_tokens), ids], dim=1)
        with _seeing(model.vision_model, seen):
            return model(pixel_values=seen, input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    return forward


@contextmanager
def _seeing(vision: Any, seen: TorchTensor) -> Iterator[None]:
    """While active, a vision model gives this."""
    vision.forward = lambda *_, **__: (seen,)
    try:
        yield
    finally:
        del vision.forward


def _query(model: Any) -> Reference:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return lambda image_embeds: (_library(model)(image_embeds, ids).image_embeds,)


def _read(model: Any) -> Reference:
    seen = torch.zeros(1, 1, model.config.vision_config.hidden_size)
    return lambda input_ids: (_library(model)(seen, input_ids).text_embeds,)


def _match(model: Any) -> Reference:
    def reference(image_embeds: TorchTensor, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (_library(model)(image_embeds, input_ids, use_image_text_matching_head=True).logits_per_image,)

    return reference


def _config(source: Source, reduced: bool = False) -> Any:
    """The model's config, checked. Raises UnsupportedModel or SourceError naming what cannot be built."""
    file = source.root / "config.json"
    found = parsed(file, Blip2Config, CONFIGS, REDUCED if reduced else {})
    require_vision(file, found)
    if not found.qformer_config.use_qformer_text_input:
        raise UnsupportedModel(
            f"{file}: qformer_config.use_qformer_text_input is false, expected true, without which the Q-Former reads "
            "no texts: take a checkpoint of this architecture"
        )
    return found


def parts(source: Source, reduced: bool) -> list[Part]:
    with without_weights():
        model: Any = Blip2ForImageTextRetrieval(_config(source, reduced)).eval()
    component, qformer = Component("", model), model.config.qformer_config
    width, images = model.config.image_text_hidden_size, Dim(name="images", min=1, opt=1, max=TILES)
    longest = qformer.max_position_embeddings
    sequence = Dim(name="sequence", min=1, opt=min(USUAL, longest), max=longest)
    patches = image_embeds(model, images)
    features = Tensor(name="image_features", dtype="float32", dims=(images, model.config.num_query_tokens, width))
    logits = Tensor(name="match_logits", dtype="float32", dims=(images, 2))
    embeds = Tensor(name="text_embeds", dtype="float32", dims=(BATCH, width))

    def ids(rows: Dim) -> Tensor:
        return Tensor(name="input_ids", dtype="int64", dims=(rows, sequence), values="below", limit=qformer.vocab_size)

    def part(name: str, module: nn.Module, reference: Reference, given: tuple[Tensor, ...], result: Tensor) -> Part:
        return Part(name, (component,), module, reference, Signature(inputs=given, outputs=(result,)))

    return [
        vision_part(component),
        part("qformer", QFormer(model), _query(model), (patches,), features),
        part("text_encoder", TextEncoder(model), _read(model), (ids(BATCH),), embeds),
        part("matcher", Matcher(model), _match(model), (patches, ids(images)), logits),
    ]


def config(source: Source) -> dict[str, Any]:
    model = _config(source)
    return EmbedConfig(
        width=model.image_text_hidden_size,
        text_length=model.qformer_config.max_position_embeddings,
        vocab_size=model.qformer_config.vocab_size,
        encoders=ENCODERS,
        matcher=True,
    ).model_dump(mode="json")


def assets(source: Source) -> Mapping[str, Path]:
    _config(source)  # transformers reads it for the tokenizer, too
    return {"tokenizer/tokenizer.json": tokenizer_file(source.root), **processors(source)}


FAMILY = Family("blip2_retrieval", "embed", ("Blip2ForImageTextRetrieval",), parts, config, assets)
