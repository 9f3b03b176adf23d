"""LLaVA 1.5: CLIP vision tower, two-layer projector, Llama-like decoder (Liu et al. 2023, arXiv:2310.03744). BakLLaVA is the same code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration

from export.family import Component, Family, Part
from export.source import Source, read_json
from export.trace import without_weights
from runtime.signature import BATCH, Dim, Signature, State, Tensor

ATTENTION: Final = "enginecast_kv"
KVCache = list[tuple[TorchTensor, TorchTensor]]


class VisionEncoder(nn.Module):
    """Vision tower and projector: pixel_values [images, 3, height, width] to image_features [images, patches, hidden]."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.layers = model.config.vision_feature_layer
        self.skip = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        layers = [self.layers] if isinstance(self.layers, int) else self.layers
        return (self.projector(torch.cat([states[layer][:, self.skip :] for layer in layers], dim=-1)),)


class TokenEmbedding(nn.Module):
    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.embed_tokens = model.model.language_model.embed_tokens

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.embed_tokens(input_ids),)


class Decoder(nn.Module):
    """Language model and head: the logits of the last position, and every layer's grown keys and values.

    Past, grouped heads and the causal mask all stay inside one ONNX `Attention` node a layer.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.head = model.model.language_model, model.lm_head
        self.decoder.config._attn_implementation = ATTENTION

    def forward(
        self, inputs_embeds: TorchTensor, attention_mask: TorchTensor, position_ids: TorchTensor, *past: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        caches = list(zip(past[0::2], past[1::2], strict=True))
        for layer, cache in zip(self.decoder.layers, caches, strict=True):
            layer.self_attn.past = cache
        length, total = inputs_embeds.shape[1], attention_mask.shape[1]
        position = torch.arange(total, device=inputs_embeds.device)
        causal = position[None, :] <= position[total - length :, None]
        mask = causal[None, None] & (attention_mask[:, None, None, :] != 0)
        hidden = self.decoder(inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, use_cache=False).last_hidden_state
        present = [layer.self_attn.present for layer in self.decoder.layers]
        return (self.head(hidden[:, -1:]), *(tensor for pair in present for tensor in pair))


def _attention(
    module: nn.Module, query: TorchTensor, key: TorchTensor, value: TorchTensor, mask: TorchTensor, scaling: float, **_: Any
) -> tuple[TorchTensor, None]:
    """ONNX `Attention` with past (opset 23): query [batch, heads, length, size], key and value with grouped heads."""
    past_key, past_value = module.past
    output, present_key, present_value, _scores = torch.onnx.ops.attention(query, key, value, mask, past_key, past_value, scale=scaling)
    module.present = (present_key, present_value)  # type: ignore[assignment]
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def _config(source: Source, reduced: bool) -> LlavaConfig:
    data = read_json(source.root / "config.json")
    if reduced:
        data = data | {"vision_feature_layer": -2}
        for part in ("vision_config", "text_config"):
            data[part] = data[part] | {"num_hidden_layers": 2}
    return LlavaConfig.from_dict(data)


def parts(source: Source, reduced: bool) -> list[Part]:
    with without_weights():
        model = LlavaForConditionalGeneration(_config(source, reduced)).eval()
    text, vision = model.config.text_config, model.config.vision_config
    side = vision.image_size // vision.patch_size
    patches = side * side + (0 if model.config.vision_feature_select_strategy == "default" else 1)
    context = text.max_position_embeddings
    images = Dim(name="images", min=1, opt=1, max=16)
    sequence = Dim(name="sequence", min=1, opt=1, max=context)
    past = Dim(name="past", min=0, opt=1023, max=context)
    total = Dim(name="total", min=1, opt=1024, max=context, sum_of=("past", "sequence"))
    heads = text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def cache(name: str, length: Dim) -> Tensor:
        return Tensor(name=name, dtype="float32", dims=(BATCH, heads, length, size))

    states = tuple(
        State(past=cache(f"past_key_values.{layer}.{kind}", past), present=cache(f"present.{layer}.{kind}", total), axis=2)
        for layer in range(text.num_hidden_layers)
        for kind in ("key", "value")
    )
    pixels = Tensor(name="pixel_values", dtype="float32", dims=(images, vision.num_channels, vision.image_size, vision.image_size))
    embeds = Tensor(name="inputs_embeds", dtype="float32", dims=(BATCH, sequence, text.hidden_size))
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, sequence), values="below", limit=text.vocab_size)
    component = Component("", model)
    return [
        Part("vision_encoder", component, VisionEncoder(model), Signature(
            inputs=(pixels,), outputs=(Tensor(name="image_features", dtype="float32", dims=(images, patches, text.hidden_size)),))),
        Part("token_embedding", component, TokenEmbedding(model), Signature(inputs=(ids,), outputs=(embeds,)), activations=False),
        Part("decoder", component, Decoder(model), Signature(
            inputs=(
                embeds,
                Tensor(name="attention_mask", dtype="int64", dims=(BATCH, total), values="ones"),
                Tensor(name="position_ids", dtype="int64", dims=(BATCH, sequence), values="positions"),
            ),
            outputs=(Tensor(name="logits", dtype="float32", dims=(BATCH, 1, text.vocab_size)),),
            states=states), activations=False),
    ]  # fmt: skip


def config(source: Source) -> dict[str, Any]:
    raise NotImplementedError


def assets(source: Source) -> Mapping[str, Path]:
    raise NotImplementedError


FAMILY = Family("llava", "chat", ("LlavaForConditionalGeneration",), parts, config, assets)
