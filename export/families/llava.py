"""LLaVA 1.5: CLIP vision tower, two-layer projector, Llama-like decoder (Liu et al. 2023, arXiv:2310.03744). BakLLaVA is the same code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor as TorchTensor
from torch import nn
from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration

from export.family import Component, Family, Part
from export.source import Source, read_json
from export.trace import without_weights
from runtime.errors import SourceError
from runtime.pipelines.chat import ChatConfig, Defaults
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
        hidden = self.decoder(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        present = [layer.self_attn.present for layer in self.decoder.layers]
        return (self.head(hidden[:, -1:]), *(tensor for pair in present for tensor in pair))


def _attention(
    module: nn.Module, query: TorchTensor, key: TorchTensor, value: TorchTensor, mask: TorchTensor, scaling: float, **_: Any
) -> tuple[TorchTensor, None]:
    """ONNX `Attention` with past (opset 23): query [batch, heads, length, size], key and value with grouped heads."""
    past_key, past_value = module.past  # type: ignore[misc]
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
    features = Tensor(name="image_features", dtype="float32", dims=(images, _patches(model.config), text.hidden_size))
    component = Component("", model)
    return [
        Part("vision_encoder", component, VisionEncoder(model), Signature(inputs=(pixels,), outputs=(features,))),
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
    model = _config(source, reduced=False)
    text, file = model.text_config, source.root / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    end = generation.get("eos_token_id", text.eos_token_id)
    sampled = bool(generation.get("do_sample"))
    defaults = Defaults(
        max_tokens=generation.get("max_new_tokens") or Defaults().max_tokens,
        temperature=generation.get("temperature", 1.0) if sampled else 0.0,
        top_k=generation.get("top_k", 50) if sampled else 0,
        top_p=generation.get("top_p", 1.0) if sampled else 1.0,
        repetition_penalty=generation.get("repetition_penalty") or 1.0,
    )
    return ChatConfig(
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        bos_token_id=_leading_token(_tokenizer(source)),
        eos_token_ids=tuple(end) if isinstance(end, list) else (end,),
        image_token_id=model.image_token_index,
        tokens_per_image=_patches(model),
        defaults=defaults,
    ).model_dump(mode="json")


def _patches(model: LlavaConfig) -> int:
    """Positions that a picture takes in the prompt: its patches, with the class token where the model keeps it."""
    side = model.vision_config.image_size // model.vision_config.patch_size
    return int(side * side) + (0 if model.vision_feature_select_strategy == "default" else 1)


def _tokenizer(source: Source) -> Path:
    file = source.root / "tokenizer.json"
    if not file.is_file():
        raise SourceError(
            f'{source.root} has no tokenizer.json. Make one: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{source.root}').save_pretrained('{source.root}')\""
        )
    return file


def _leading_token(tokenizer: Path) -> int | None:
    """The token that the model's tokenizer puts before every text by itself, if any."""
    try:
        ids = Tokenizer.from_file(str(tokenizer)).encode("").ids
    except Exception as error:  # the library raises no other class
        raise SourceError(f"{tokenizer} cannot be read: {error}. Download it again") from None
    return int(ids[0]) if ids else None


def assets(source: Source) -> Mapping[str, Path]:
    _tokenizer(source)
    text = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
    vision = ("preprocessor_config.json", "processor_config.json")
    wanted = {f"tokenizer/{name}": source.root / name for name in text} | {f"preprocessor/{name}": source.root / name for name in vision}
    return {path: file for path, file in wanted.items() if file.is_file()}


FAMILY = Family("llava", "chat", ("LlavaForConditionalGeneration",), parts, config, assets)
