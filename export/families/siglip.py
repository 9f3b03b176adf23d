"""SigLIP: a text encoder and a vision encoder into one space, trained pair by pair with a sigmoid (Zhai et al. 2023,
arXiv:2303.15343). SigLIP 2 with pictures of one size is the same model with another tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

from export.architecture.qformer import processors, unit
from export.checkpoint.source import Source
from export.checkpoint.tokenizer import tokenizer_file
from export.families.clip import read_config
from export.family import Component, Family, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.vision import TILES
from runtime.pipelines.embed import BIAS, SCALE, EmbedConfig


class VisionEncoder(nn.Module):
    """pixel_values [images, 3, height, width] to normalized image_features [images, width]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        return (unit(self.vision_model(pixel_values).pooler_output),)


class TextEncoder(nn.Module):
    """input_ids [batch, sequence] to normalized text_embeds [batch, width]. The model reads all positions, padding
    included, and gives the last.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model = model.text_model

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (unit(self.text_model(input_ids).pooler_output),)


def _see(model: Any) -> Reference:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return lambda pixel_values: (model(input_ids=ids, pixel_values=pixel_values).image_embeds,)


def _read(model: Any) -> Reference:
    size = model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, size, size)
    return lambda input_ids: (model(input_ids=input_ids, pixel_values=pixels).text_embeds,)


def _config(source: Source, reduced: bool = False) -> Any:
    """The model's config, checked. Raises UnsupportedModel or SourceError naming what cannot be built."""
    file, found = source.root / "config.json", read_config(source, SiglipConfig, reduced)
    text, vision = found.text_config, found.vision_config
    if getattr(vision, "vision_use_head", True) is False:
        raise UnsupportedModel(
            f"{file}: vision_config.vision_use_head is false, so that the tower gives no embedding of a picture: take "
            "the checkpoint that it was cut from"
        )
    if text.projection_size != vision.hidden_size:
        raise SourceError(
            f"{file}: text_config.projection_size is {text.projection_size}, expected {vision.hidden_size} "
            "(vision_config.hidden_size), the width of a picture's embedding. Correct it"
        )
    return found


def parts(source: Source, reduced: bool) -> list[Part]:
    with without_weights():
        model = SiglipModel(_config(source, reduced)).eval()
    vision, text = model.config.vision_config, model.config.text_config
    components = (Component("", model, tensors={SCALE: SCALE, BIAS: BIAS}),)
    images, size = Dim(name="images", min=1, opt=1, max=TILES), vision.image_size
    pixels = Tensor(name="pixel_values", dtype="float32", dims=(images, 3, size, size))
    features = Tensor(name="image_features", dtype="float32", dims=(images, vision.hidden_size))
    length, limit = text.max_position_embeddings, text.vocab_size
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, length), values="below", limit=limit)
    embeds = Tensor(name="text_embeds", dtype="float32", dims=(BATCH, vision.hidden_size))
    seen, read = Signature(inputs=(pixels,), outputs=(features,)), Signature(inputs=(ids,), outputs=(embeds,))
    return [
        Part("vision_encoder", components, VisionEncoder(model), _see(model), seen),
        Part("text_encoder", components, TextEncoder(model), _read(model), read),
    ]


def config(source: Source) -> dict[str, Any]:
    model = _config(source)
    return EmbedConfig(
        width=model.vision_config.hidden_size,
        text_length=model.text_config.max_position_embeddings,
        vocab_size=model.text_config.vocab_size,
        padding=_padding(source),
        scaled=True,
        biased=True,
    ).model_dump(mode="json")


def _padding(source: Source) -> int:
    """The token that fills texts up to the length that the model was trained with. Raises SourceError for none, and for
    a tokenizer that puts it in front.
    """
    tokenizer_file(source.root)  # raises for files that the library cannot read
    tokenizer: Any = AutoTokenizer.from_pretrained(source.root, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise SourceError(
            f"{source.root}: its tokenizer has the pad_token {tokenizer.pad_token!r} and the padding_side "
            f"'{tokenizer.padding_side}', expected a token that follows texts ('right'). Correct tokenizer_config.json"
        )
    return int(tokenizer.pad_token_id)


def assets(source: Source) -> Mapping[str, Path]:
    _config(source)  # transformers reads it for the tokenizer, too
    return {"tokenizer/tokenizer.json": tokenizer_file(source.root), **processors(source)}


FAMILY = Family("siglip", "embed", ("SiglipModel",), parts, config, assets)
