"""CLIP: a text encoder and a vision encoder into one space (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPConfig, CLIPModel

from export.architecture.configs import parsed, require_activation
from export.architecture.ends import LEGACY_END
from export.architecture.qformer import processors, unit
from export.checkpoint.source import Source
from export.checkpoint.tokenizer import tokenizer_file
from export.family import Component, Family, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import SourceError
from runtime.language.vision import TILES
from runtime.pipelines.embed import SCALE, EmbedConfig

CONFIGS: Final = ("text_config", "vision_config")
USUAL: Final = 16
"""Tokens of a text that targets with fixed lengths prepare for first."""


class VisionEncoder(nn.Module):
    """pixel_values [images, 3, height, width] to normalized image_features [images, width]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        found = self.projection(self.vision_model(pixel_values).pooler_output)
        return (unit(found),)


class TextEncoder(nn.Module):
    """input_ids [batch, sequence] to normalized text_embeds [batch, width].

    The library reads a text where its end token is. Rows have no padding here, so that is the last position.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model, self.projection = model.text_model, model.text_projection

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (unit(self.projection(self.text_model(input_ids).last_hidden_state[:, -1])),)


def _see(model: Any) -> Reference:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return lambda pixel_values: (model(input_ids=ids, pixel_values=pixel_values).image_embeds,)


def _read(model: Any) -> Reference:
    """The library's text model, projection and norm. Random tokens of a sample do not end in the end token."""

    def reference(input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        found = model.text_projection(model.text_model(input_ids).last_hidden_state[:, -1])
        return (nn.functional.normalize(found, dim=-1),)

    return reference


def read_config(source: Source, kind: type[Any], reduced: bool) -> Any:
    """The config of a model with a text encoder and a vision encoder, of the library's class `kind`, checked. Raises
    UnsupportedModel or SourceError naming what cannot be built.
    """
    file = source.root / "config.json"
    changes = {part: {"num_hidden_layers": 2} for part in CONFIGS} if reduced else {}
    found: Any = parsed(file, kind, CONFIGS, changes)
    for part in CONFIGS:
        require_activation(file, f"{part}.hidden_act", getattr(found, part).hidden_act)
    if found.vision_config.num_channels != 3:
        raise SourceError(
            f"{file}: vision_config.num_channels is {found.vision_config.num_channels}, expected 3 (red, green, blue). "
            "Correct it"
        )
    return found


def parts(source: Source, reduced: bool) -> list[Part]:
    with without_weights():
        model = CLIPModel(read_config(source, CLIPConfig, reduced)).eval()
    vision, text, width = model.config.vision_config, model.config.text_config, model.config.projection_dim
    components = (Component("", model, tensors={SCALE: SCALE}),)
    images, size = Dim(name="images", min=1, opt=1, max=TILES), vision.image_size
    longest = text.max_position_embeddings
    sequence = Dim(name="sequence", min=1, opt=min(USUAL, longest), max=longest)
    pixels = Tensor(name="pixel_values", dtype="float32", dims=(images, 3, size, size))
    features = Tensor(name="image_features", dtype="float32", dims=(images, width))
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, sequence), values="below", limit=text.vocab_size)
    embeds = Tensor(name="text_embeds", dtype="float32", dims=(BATCH, width))
    seen, read = Signature(inputs=(pixels,), outputs=(features,)), Signature(inputs=(ids,), outputs=(embeds,))
    return [
        Part("vision_encoder", components, VisionEncoder(model), _see(model), seen),
        Part("text_encoder", components, TextEncoder(model), _read(model), read),
    ]


def config(source: Source) -> dict[str, Any]:
    model = read_config(source, CLIPConfig, False)
    _require_end(source, model.text_config)
    return EmbedConfig(
        width=model.projection_dim,
        text_length=model.text_config.max_position_embeddings,
        vocab_size=model.text_config.vocab_size,
        scaled=True,
    ).model_dump(mode="json")


def _require_end(source: Source, text: Any) -> None:
    """Raises SourceError where the tokenizer does not end texts in the token at which the model reads them: in configs
    of before transformers 4.31, whose end token is 2, the one with the largest id.
    """
    file = tokenizer_file(source.root)
    tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    ids = tokenizer.encode("x").ids
    end = max(ids, default=-1) if text.eos_token_id == LEGACY_END else text.eos_token_id
    if ids.count(end) != 1 or ids[-1] != end:
        raise SourceError(
            f"{file} does not end texts in token {end}, at which the model reads them (text_config.eos_token_id is "
            f"{text.eos_token_id}): take both from the same checkpoint"
        )


def assets(source: Source) -> Mapping[str, Path]:
    read_config(source, CLIPConfig, False)  # transformers reads it for the tokenizer, too
    return {"tokenizer/tokenizer.json": tokenizer_file(source.root), **processors(source)}


FAMILY = Family("clip", "embed", ("CLIPModel",), parts, config, assets)
