"""Language models with an encoder and a decoder as graphs: T5 (Raffel et al. 2020, arXiv:1910.10683) and Flan-T5.

The encoder's graph ends in the keys and values that the decoder's cross-attention reads in every layer: they are
computed once for a prompt, do not grow, and are inputs of the decoder. The decoder keeps only those of its
self-attention. Its relative position bias is added to the mask of the ONNX `Attention` node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from export.architecture.decoders import GrownLayer, attending, causal, narrowed
from export.checkpoint.source import Source, read_json
from export.family import Component, Part, Reference
from runtime.bundle.signature import BATCH, Dim, Port, Signature, State, Tensor
from runtime.errors import NotFound, SourceError, UnsupportedModel

ATTENTION: Final = "enginecast_kv_bias"
"""Name of the attention that decoders with a position bias compute with while they are traced."""
MODELS: Final = ("t5",)
"""`model_type` of every model that was compared with transformers, answer by answer."""
CONTEXT: Final = 512
"""Positions of a model whose config says nothing: relative positions have no limit, and T5 was trained with these."""


class DistanceBias(nn.Module):
    """What a stack adds to the products of queries and keys by their distance, which the first layer's embedding says.

    Distances that share a bucket are found once, by the library: beyond the largest one all have the last bucket.
    """

    buckets: TorchTensor
    limits: TorchTensor

    def __init__(self, stack: Any) -> None:
        super().__init__()
        attention = stack.block[0].layer[0].SelfAttention
        self.embedding, self.farthest = attention.relative_attention_bias, attention.relative_attention_max_distance
        ahead = 0 if stack.is_decoder else self.farthest
        buckets = attention._relative_position_bucket(
            torch.arange(-self.farthest, ahead + 1),
            bidirectional=not stack.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=self.farthest,
        )
        self.register_buffer("buckets", buckets, persistent=False)
        self.register_buffer("limits", torch.tensor([-self.farthest, ahead]), persistent=False)

    def forward(self, queries: TorchTensor, keys: TorchTensor) -> TorchTensor:
        """[batch, heads, queries, keys] of the positions of queries [batch, queries] and of keys [keys]."""
        distance = keys - queries[:, :, None]
        distance = torch.maximum(torch.minimum(distance, self.limits[1]), self.limits[0])
        found = nn.functional.embedding(distance + self.farthest, self.embedding(self.buckets))
        return found.permute(0, 3, 1, 2)


class TextEncoder(nn.Module):
    """Encoder, and the projections of the decoder's cross-attention: inputs_embeds [batch, source, hidden] to keys and
    values [batch, heads, source, size] of every layer of the decoder.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.bias = model.encoder, DistanceBias(model.encoder)
        self.cross = nn.ModuleList(block.layer[1].EncDecAttention for block in model.decoder.block)

    def forward(self, inputs_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        hidden, bias = inputs_embeds, self.bias(position[None], position)
        for block in self.encoder.block:  # the model's own forward makes a mask that hides nothing
            hidden, *_ = block(hidden, position_bias=bias)
        hidden, cross = self.encoder.final_layer_norm(hidden), list[Any](self.cross)
        return tuple(
            project(hidden).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
            for attention in cross
            for project in (attention.k, attention.v)
        )


class BiasedDecoder(nn.Module):
    """Decoder and head: inputs_embeds [batch, sequence, hidden], attention_mask [batch, total], position_ids [batch,
    sequence], the encoder's keys and values of each layer and those before the call, to logits [batch, 1, vocab] and
    the keys and values with those of the call.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head, self.bias = model.decoder, model.lm_head, DistanceBias(model.decoder)
        self.scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(
        self, inputs_embeds: TorchTensor, attention_mask: TorchTensor, position_ids: TorchTensor, *given: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        count = len(given) // 2
        cross = [_HeldLayer(*pair) for pair in _pairs(given[:count])]
        layers = [GrownLayer(*pair) for pair in _pairs(given[count:])]
        held = EncoderDecoderCache(Cache(layers=layers), Cache(layers=cross))
        held.is_updated = dict.fromkeys(range(len(cross)), True)
        seen = causal(attention_mask, position_ids.shape[1])
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        hidden, bias = inputs_embeds, self.bias(position_ids, places)
        with attending(self.decoder.config, ATTENTION):
            for block in self.decoder.block:
                hidden, *_ = block(hidden, seen, bias, hidden, None, bias, past_key_values=held, held=held)
        hidden = self.decoder.final_layer_norm(hidden[:, -1:])
        return (self.head(hidden * self.scale), *(each for layer in layers for each in (layer.keys, layer.values)))


class _HeldLayer(DynamicLayer):
    """Keys and values of the encoder."""

    def __init__(self, keys: TorchTensor, values: TorchTensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True


def _pairs(tensors: tuple[TorchTensor, ...]) -> Iterator[tuple[TorchTensor, TorchTensor]]:
    return zip(tensors[0::2], tensors[1::2], strict=True)


def _attention(
    module: Any,
    query: TorchTensor,
    key: TorchTensor,
    value: TorchTensor,
    mask: TorchTensor | None,
    scaling: float,
    position_bias: TorchTensor,
    held: EncoderDecoderCache,
    **_: Any,
) -> tuple[TorchTensor, None]:
    """ONNX `Attention` (opset 23): of the self-attention with past and a mask that holds the bias, else of the
    encoder's keys and values.
    """
    if mask is None:
        output, *_unused = torch.onnx.ops.attention(query, key, value, scale=scaling)
        return output.transpose(1, 2), None
    layer: Any = held.self_attention_cache.layers[module.layer_idx]
    hidden = torch.where(mask, position_bias, torch.finfo(query.dtype).min)
    output, layer.keys, layer.values, _scores = torch.onnx.ops.attention(
        query, key, value, hidden, layer.keys, layer.values, scale=scaling
    )
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def library_encoder(model: Any) -> Reference:
    """What a `TextEncoder` is compared with: the cross-attention cache that the library itself fills."""

    def reference(inputs_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = torch.zeros_like(inputs_embeds[:, :1])
        model(inputs_embeds=inputs_embeds, decoder_inputs_embeds=first, past_key_values=cache, use_cache=True)
        return _tensors(cache.cross_attention_cache)

    return reference


def library_decoder(model: Any) -> Reference:
    """What a `BiasedDecoder` is compared with: the library's own forward over its own cache and attention."""

    def reference(
        inputs_embeds: TorchTensor, attention_mask: TorchTensor, position_ids: TorchTensor, *given: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        count = len(given) // 2
        caches = DynamicCache(), DynamicCache()
        for cache, tensors in zip(caches, (given[count:], given[:count]), strict=True):
            for layer, pair in enumerate(_pairs(tensors)):
                cache.update(*pair, layer)
        held = EncoderDecoderCache(*caches)
        found = model(
            encoder_outputs=(torch.zeros_like(inputs_embeds),),  # it has the cross-attention's keys and values
            decoder_inputs_embeds=inputs_embeds,
            decoder_attention_mask=attention_mask,
            past_key_values=held,
            use_cache=True,
        )
        return (found.logits[:, -1:], *_tensors(held.self_attention_cache))

    return reference


def _tensors(cache: Any) -> tuple[TorchTensor, ...]:
    return tuple(each for layer in cache.layers for each in (layer.keys, layer.values))


def encoder_signature(text: Any) -> Signature:
    """Embeddings of a prompt, and the keys and values of every layer of the decoder."""
    source = _source(text)
    embeds = Tensor(name="inputs_embeds", dtype="float32", dims=(BATCH, source, text.hidden_size))
    return Signature(inputs=(embeds,), outputs=tuple(_caches(text, "encoder", source)))


def decoder_signature(text: Any) -> Signature:
    """As that of other decoders, with the encoder's keys and values as further inputs."""
    port, context = Port(), context_of(text)
    sequence = Dim(name=port.sequence, min=1, opt=1, max=context)
    past = Dim(name=port.past, min=0, opt=63, max=context)
    total = Dim(name=port.total, min=1, opt=64, max=context, sum_of=(port.past, port.sequence))
    states = zip(_caches(text, "past_key_values", past), _caches(text, "present", total), strict=True)
    return Signature(
        inputs=(
            Tensor(name=port.embeddings, dtype="float32", dims=(BATCH, sequence, text.hidden_size)),
            Tensor(name=port.mask, dtype="int64", dims=(BATCH, total), values="ones"),
            Tensor(name=port.positions, dtype="int64", dims=(BATCH, sequence), values="places"),
            *_caches(text, "encoder", _source(text)),
        ),
        outputs=(Tensor(name=port.logits, dtype="float32", dims=(BATCH, 1, text.vocab_size)),),
        states=tuple(State(past=before, present=after, axis=2) for before, after in states),
        port=port,
    )


def _source(text: Any) -> Dim:
    return Dim(name="source", min=1, opt=64, max=context_of(text))


def _caches(text: Any, name: str, length: Dim) -> Iterator[Tensor]:
    """Keys and values of every layer of the decoder."""
    for layer in range(text.num_decoder_layers):
        for kind in ("key", "value"):
            dims = BATCH, text.num_heads, length, text.d_kv
            yield Tensor(name=f"{name}.{layer}.{kind}", dtype="float32", dims=dims)


def context_of(text: Any) -> int:
    """The most positions of a prompt, and of an answer."""
    return int(getattr(text, "n_positions", None) or CONTEXT)


def language_parts(component: Component, model: Any) -> list[Part]:
    """Encoder and decoder of the language model `model` of a component."""
    text = model.config
    return [
        Part("text_encoder", (component,), TextEncoder(model), library_encoder(model), encoder_signature(text),
             activations=False, float16=False),
        Part("decoder", (component,), BiasedDecoder(model), library_decoder(model), decoder_signature(text),
             activations=False, float16=False),
    ]  # fmt: skip


def require_known(file: Any, text: Any) -> None:
    """Raises UnsupportedModel naming a language model that is not built here. `file` is its config's."""
    if text.model_type not in MODELS:
        raise UnsupportedModel(
            f"{file}: its language model (text_config.model_type) is a {text.model_type}, expected one of "
            f"{', '.join(MODELS)}, or a decoder alone: take a checkpoint with such a model"
        )


def reduced(text: Any) -> dict[str, Any]:
    """The config of a model with few layers and the sizes of a twin."""
    data = narrowed(text.to_dict())
    return data | {"num_layers": 2, "num_decoder_layers": 2}


def untie(model: Any, source: Source) -> None:
    """Give a head of its own to the language model whose checkpoint has one, as Flan-T5: transformers ties all of T5 in
    the config and leaves those untied on load whose weights differ. Where there are no weights yet, the file of the
    config decides.
    """
    name = "language_model.lm_head.weight"
    try:
        own = name in source.open().tensors
    except (NotFound, SourceError):
        own = read_json(source.root / "config.json")["text_config"].get("tie_word_embeddings") is False
    if own:
        head = model.language_model.lm_head
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
        model.all_tied_weights_keys.pop(name, None)


def start_token(text: Any) -> int:
    """The token that the decoder begins with."""
    named = getattr(text, "decoder_start_token_id", None)
    return int(text.pad_token_id if named is None else named)
