"""Cross-attention that reads pictures, with scales that are inputs of the graph. In diffusers they are settings of the
UNet, and what has the scale 0 is left out.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import Tensor
from torch.nn import functional

Picture = tuple[Tensor, Tensor]


class Projections(MultiIPAdapterImageProjection):
    """The library's projections of pictures. Pairs of features [batch, positions, width], of plain adapters [batch, 1,
    width], and scale [batch, 1, 1] become pairs of tokens [batch, tokens, hidden], plain for keys and scaled for
    values: the value of a token is linear in it.
    """

    def forward(self, image_embeds: Any) -> Any:
        if isinstance(image_embeds[0], Tensor):
            return super().forward(image_embeds)
        found = []
        for (embeds, scale), projection in zip(image_embeds, self.image_projection_layers, strict=True):
            tokens = projection(embeds[:, 0] if isinstance(projection, ImageProjection) else embeds)
            found.append((tokens, scale * tokens))
        return found


class Attention(IPAdapterAttnProcessor2_0):
    """The library's attention to pictures; pairs of tokens, as `Projections` makes them, are read here."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        text, pictures = encoder_hidden_states
        if isinstance(pictures[0], Tensor):
            found: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return found
        query = attn.to_q(hidden_states)
        total = _attend(attn.heads, query, attn.to_k(text), attn.to_v(text))
        for (tokens, scaled), to_k, to_v in zip(pictures, self.to_k_ip, self.to_v_ip, strict=True):
            total = total + _attend(attn.heads, query, to_k(tokens), to_v(scaled))
        result = attn.to_out[0](total)
        if attn.residual_connection:
            result = result + hidden_states
        return result / attn.rescale_output_factor


def _attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    split = [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (query, key, value)]
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Factor:
    """A scale [batch, 1, 1], for the library's attention: never equal to 0, so that nothing is left out."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, other: Tensor) -> Tensor:
        return self.value * other


def adapted(unet: UNet2DConditionModel) -> list[Any]:
    """The processors of the UNet's cross-attentions that read pictures, in its order."""
    return [one for one in unet.attn_processors.values() if isinstance(one, Attention)]
