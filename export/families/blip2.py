"""BLIP-2: vision transformer, Q-Former with learned queries, language model (Li et al. 2023, arXiv:2301.12597).

The language model is OPT or Flan-T5, as in the published models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as TorchTensor
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from export.architecture.decoders import LEARNED
from export.architecture.qformer import QFormerFamily, image_embeds, image_features
from export.family import Component, Part, Reference
from runtime.bundle.signature import Dim, Signature
from runtime.language.vision import TILES


class QFormer(nn.Module):
    """Q-Former and projection: image_embeds [images, patches, hidden] to image_features [images, queries, hidden of the
    language model].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.query_tokens, self.qformer, self.projection = model.query_tokens, model.qformer, model.language_projection

    def forward(self, image_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        queries = self.qformer.layernorm(self.query_tokens).expand(image_embeds.shape[0], -1, -1)
        found = self.qformer.encoder(  # the model's own forward makes a mask that hides nothing
            queries, encoder_hidden_states=image_embeds, query_length=queries.shape[1]
        )
        return (self.projection(found.last_hidden_state),)


def qformer_part(component: Component) -> Part:
    model: Any = component.model
    images = Dim(name="images", min=1, opt=1, max=TILES)
    signature = Signature(inputs=(image_embeds(model, images),), outputs=(image_features(model, images),))
    return Part("qformer", (component,), QFormer(model), _query(model), signature)


def _query(model: Any) -> Reference:
    """The steps of the library's `get_image_features` behind the vision model."""

    def reference(image_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        found = model.qformer(
            query_embeds=model.query_tokens.expand(image_embeds.shape[0], -1, -1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.int64),
        )
        return (model.language_projection(found.last_hidden_state),)

    return reference


FAMILY = QFormerFamily("blip2", Blip2ForConditionalGeneration, Blip2Config, LEARNED, qformer_part).family
