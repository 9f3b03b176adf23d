"""Language decoders of transformers as graphs: the logits of the last position, and the keys and values of every layer.

Past, grouped heads and the mask stay inside one ONNX `Attention` node a layer. The library itself makes the masks, so
that layers with windowed attention see the same positions as there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from export.family import Reference
from runtime.bundle.signature import BATCH, Dim, Port, Signature, State, Tensor
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.decoder import HIDDEN

ATTENTION: Final = "enginecast_kv"
"""Name of the attention and the mask function of decoders while they are traced."""

DECODERS: Final = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text", "granite", "olmo", "olmo2",
    "olmo3",
    "starcoder2", "phi", "cohere", "cohere2", "smollm3", "ministral", "exaone4", "glm", "glm4", "helium")  # fmt: skip
"""`model_type` of every decoder that was compared with transformers, answer by answer."""

LEARNED: Final = ("opt",)
"""Those with learned positions, compared alike. transformers has no LLaVA with one of them."""

CHANGING: Final = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments of an attention that change its result and are not supported."""

STATIC: Final = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary types whose frequencies are the same for every length."""

LENGTHS: Final = ("dynamic", "longrope")
"""Rotary types whose frequencies depend on the longest position of a call: cached keys would have other frequencies
than new ones.
"""

TWIN_WINDOW: Final = 8
"""Positions that the attention of a twin sees where the model's is limited: short enough to go beyond it in a sample.
"""

TWIN_SIZES: Final = {"vocab_size": 4096, "intermediate_size": 4096}
"""The most tokens and inner features of a twin. A head of the published size in float32, as it is and transposed, would
be most of what comparing it takes of memory: 3.7 GB with 64,000 tokens and a width of 7168.
"""


class Decoder(nn.Module):
    """A language model and its head, connected as in transformers' own forward.

    Takes inputs_embeds [batch, sequence, hidden], attention_mask [batch, total], position_ids [batch, sequence] and,
    for each layer, keys and values [batch, heads, past, size]; gives logits [batch, 1, vocab], with `states` what they
    are computed of [batch, 1, hidden], and keys and values [batch, heads, total, size].
    """

    def __init__(self, decoder: Any, head: nn.Module, states: bool = False) -> None:
        super().__init__()
        self.decoder, self.head, self.states = decoder, head, states

    def forward(
        self, inputs_embeds: TorchTensor, attention_mask: TorchTensor, position_ids: TorchTensor, *past: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        layers = [GrownLayer(*pair) for pair in zip(past[0::2], past[1::2], strict=True)]
        held = Cache(layers=layers)
        with attending(self.decoder.config, ATTENTION):
            hidden = self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=held,
                use_cache=True,
                held=held,
            ).last_hidden_state
        last = hidden[:, -1:]
        given = (self.head(last), last) if self.states else (self.head(last),)
        return (*given, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


class GrownLayer(DynamicLayer):
    """Keys and values of one layer: those before a call, and after the call with its new ones."""

    def __init__(self, keys: TorchTensor, values: TorchTensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.past = int(keys.shape[-2]) if isinstance(keys.shape[-2], int) else keys.shape[-2]

    def update(
        self, key_states: TorchTensor, value_states: TorchTensor, *_: Any, **__: Any
    ) -> tuple[TorchTensor, TorchTensor]:
        """Nothing to do: the attention appends them."""
        return key_states, value_states

    def get_seq_length(self) -> Any:
        """Positions before the call. The library's own method reads values, which a tracer does not have."""
        return self.past


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """While active, the model of that config computes attention, and masks, with the functions registered as that."""
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def _attention(
    module: Any,
    query: TorchTensor,
    key: TorchTensor,
    value: TorchTensor,
    mask: TorchTensor,
    scaling: float,
    held: Cache,
    **more: Any,
) -> tuple[TorchTensor, None]:
    """ONNX `Attention` with past (opset 23): query [batch, heads, length, size], key and value with grouped heads."""
    unknown = [name for name in CHANGING if more.get(name) is not None]
    if unknown:
        raise UnsupportedModel(
            f"the attention of a {module.config.model_type} has {', '.join(unknown)}, which no target has a kernel for"
        )
    layer: Any = held.layers[module.layer_idx]
    output, layer.keys, layer.values, _scores = torch.onnx.ops.attention(
        query, key, value, mask, layer.keys, layer.values, scale=scaling
    )
    return output.transpose(1, 2), None


def _mask(
    attention_mask: TorchTensor, q_length: int, mask_function: Callable[..., TorchTensor], batch_size: int, **_: Any
) -> TorchTensor:
    """The positions that each new one sees, bool [batch, 1, length, total]: those of the library's `mask_function`
    without padding.
    """
    total = attention_mask.shape[1]
    position = torch.arange(total, device=attention_mask.device)
    row = torch.arange(batch_size, device=attention_mask.device)[:, None, None, None]
    seen = mask_function(row, 0, position[None, None, total - q_length :, None], position[None, None, None, :])
    return seen & attention_mask[:, None, None, :]


def causal(attention_mask: TorchTensor, q_length: int) -> TorchTensor:
    """The mask of a decoder whose positions see all before them: bool [batch, 1, length, total]."""
    return _mask(attention_mask.bool(), q_length, lambda row, head, query, key: key <= query, attention_mask.shape[0])


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def library_decoder(model: Any, states: bool = False) -> Reference:
    """The reference of a `Decoder`: the library's own forward with its own cache and attention, with the same inputs
    and outputs.

    `model` is a model of transformers with a head; `states` is as of `Decoder`.
    """
    read = list[TorchTensor]()

    def note(_head: nn.Module, inputs: tuple[TorchTensor, ...]) -> None:
        read[:] = inputs[:1]

    def reference(
        inputs_embeds: TorchTensor, attention_mask: TorchTensor, position_ids: TorchTensor, *past: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[0::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        with model.get_output_embeddings().register_forward_pre_hook(note):
            found = model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        given = (found.logits, read.pop()) if states else (found.logits,)
        layers: list[Any] = cache.layers
        return (*given, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))

    return reference


def decoder_signature(text: Any, states: bool = False) -> Signature:
    """Inputs, outputs and states of a `Decoder` of that config, under the names of transformers. `states` is as
    there.
    """
    port, context = Port(), text.max_position_embeddings
    sequence = Dim(name=port.sequence, min=1, opt=1, max=context)
    past = Dim(name=port.past, min=0, opt=min(1024, context) - 1, max=context)
    total = Dim(name=port.total, min=1, opt=min(1024, context), max=context, sum_of=(port.past, port.sequence))
    return Signature(
        inputs=(
            Tensor(name=port.embeddings, dtype="float32", dims=(BATCH, sequence, text.hidden_size)),
            Tensor(name=port.mask, dtype="int64", dims=(BATCH, total), values="ones"),
            Tensor(name=port.positions, dtype="int64", dims=(BATCH, sequence), values="positions"),
        ),
        outputs=(
            Tensor(name=port.logits, dtype="float32", dims=(BATCH, 1, text.vocab_size)),
            *((Tensor(name=HIDDEN, dtype="float32", dims=(BATCH, 1, text.hidden_size)),) if states else ()),
        ),
        states=_states(text, past, total),
        port=port,
    )


def _states(text: Any, past: Dim, total: Dim) -> tuple[State, ...]:
    """Keys and values of every layer."""
    heads, size = getattr(text, "num_key_value_heads", text.num_attention_heads), head_size(text)

    def cache(name: str, length: Dim) -> Tensor:
        return Tensor(name=name, dtype="float32", dims=(BATCH, heads, length, size))

    return tuple(
        State(
            past=cache(f"past_key_values.{i}.{kind}", past),
            present=cache(f"present.{i}.{kind}", total),
            axis=2,
            window=window,
        )
        for i, window in enumerate(windows(text))
        for kind in ("key", "value")
    )


def activation(text: Any) -> str:
    """The name of the function between the layers of the feed-forward network."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return str(next(filter(None, (getattr(text, name, None) for name in names))))


def head_size(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def windows(text: Any) -> list[int]:
    """The number of positions that the attention of each layer sees, its own included; 0 means all.

    Configs with `layer_types` state it for each layer, others have one window for all.
    """
    window = getattr(text, "sliding_window", None) or 0
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    limited = window if window < text.max_position_embeddings else 0
    return [limited if kind == "sliding_attention" else 0 for kind in types]


def reduced_decoder(text: PreTrainedConfig, layers: int = 2) -> dict[str, Any]:
    """The config of a decoder with few layers, one of each kind that it has, a window short enough for samples, and the
    sizes of a twin.
    """
    data = narrowed(text.to_dict())
    count = data["num_hidden_layers"]
    listed = {key: values for key, values in data.items() if isinstance(values, list) and len(values) == count}
    kinds = [tuple(str(values[i]) for values in listed.values()) for i in range(count)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    kept = sorted({*first, *[i for i in range(count) if i not in first][: max(0, layers - len(first))]})
    data |= {key: [values[i] for i in kept] for key, values in listed.items()} | {"num_hidden_layers": len(kept)}
    if data.get("sliding_window"):
        data["sliding_window"] = min(TWIN_WINDOW, data["sliding_window"])
    return data


def narrowed(data: dict[str, Any]) -> dict[str, Any]:
    """The same config with no more than the sizes of a twin."""
    sizes = {key: min(data[key], most) for key, most in TWIN_SIZES.items() if key in data}
    padding = data.get("pad_token_id")
    return data | sizes | {"pad_token_id": padding if padding is None else min(padding, sizes["vocab_size"] - 1)}


def require_known(file: Any, text: Any, known: Collection[str] = DECODERS) -> None:
    """Raises UnsupportedModel or SourceError naming the setting of a decoder's config that is not supported. `file` is
    the config's, `known` are the decoders that the family can have.
    """
    if text.model_type not in known:
        raise UnsupportedModel(
            f"{file}: its language model (text_config.model_type) is a {text.model_type}, expected one of "
            f"{', '.join(sorted(known))}: "
            "take a checkpoint with such a decoder"
        )
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for found in nested:
        kind = found.get("rope_type", "default")
        if kind not in STATIC:
            reason = (
                "whose frequencies change with the length of a conversation"
                if kind in LENGTHS
                else "which is not known"
            )
            raise UnsupportedModel(
                f"{file}: text_config has rotary embeddings of type '{kind}', {reason}, expected one of "
                f"{', '.join(STATIC)}: take a "
                "checkpoint of the model without it"
            )
    window = getattr(text, "sliding_window", None)
    if window is not None and window < 1:
        raise SourceError(
            f"{file}: text_config.sliding_window is {window}, expected 1 or more, or null for none. Correct it"
        )
