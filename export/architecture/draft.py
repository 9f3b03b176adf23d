"""Drafts of language models: a small network behind the decoder that guesses an answer's next tokens
(`runtime.language.drafting`), trained for one model and added to it by a build.

A file of safetensors with two matrices, of any width `inner` and any number of heads: `up.weight` [inner, 2 * hidden]
and `down.weight` [heads * hidden, inner]. Head k gives the state that the token k + 1 places behind is guessed of,
state + down[k] * silu(up * [state, embedding]), and the model's own logits layer makes logits of it: the residual
layers of Medusa (Cai et al. 2024, arXiv:2401.10774), which here also read the token that was chosen.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor as TorchTensor
from torch import nn
from torch.nn import functional as F

from export.architecture.matching import check_made_for
from export.checkpoint.component import open_file
from export.checkpoint.source import Source
from export.family import Component, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Signature, Tensor
from runtime.errors import InvalidInput, UnsupportedModel
from runtime.language.decoder import HIDDEN
from runtime.language.drafting import SUBMODEL

KIND: Final = "draft"
UP: Final = "up.weight"
DOWN: Final = "down.weight"


class Draft(nn.Module):
    """A state and the token that was chosen of it, `states` and `embeds` [batch, 1, hidden], to the states
    [batch, heads, hidden] of the tokens behind it.
    """

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.hidden, self.heads = hidden, heads
        self.up, self.down = nn.Linear(2 * hidden, inner, bias=False), nn.Linear(inner, heads * hidden, bias=False)

    def forward(self, states: TorchTensor, embeds: TorchTensor) -> TorchTensor:
        changed = self.down(F.silu(self.up(torch.cat([states, embeds], dim=-1))))
        return states + changed.reshape(-1, self.heads, self.hidden)


class Drafting(nn.Module):
    """A draft and the model's logits layer: states and embeddings to logits [batch, heads, vocab]."""

    def __init__(self, draft: Draft, head: nn.Module) -> None:
        super().__init__()
        self.draft, self.head = draft, head

    def forward(self, states: TorchTensor, embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.head(self.draft(states, embeds)),)


def drafted(source: Source) -> bool:
    """Whether a build adds a draft. Raises InvalidInput for several."""
    added = source.added(KIND)
    if len(added) > 1:
        raise InvalidInput(KIND, f"is given {len(added)} times, expected one draft: leave out the others")
    return bool(added)


def draft_parts(source: Source, component: Component, head: nn.Module, text: Any, reduced: bool) -> list[Part]:
    """The submodel of the draft that a build adds to a model with this logits layer and this config of its language
    model; none where it adds none. `reduced` is as in `Family.parts`.

    Raises NotFound, SourceError, or UnsupportedModel for the draft of another model.
    """
    if not drafted(source):
        return []
    file, hidden = source.added(KIND)[0].path, text.hidden_size
    if file.is_dir():
        raise UnsupportedModel(f"{file} is a folder, expected the .safetensors file of a draft")
    tensors = open_file(file).tensors
    if any(name not in tensors or len(tensors[name].shape) != 2 for name in (UP, DOWN)):
        raise UnsupportedModel(
            f"{file} is no draft: expected {UP} [inner, {2 * hidden}] and {DOWN} [heads * {hidden}, inner]"
        )
    with without_weights():
        draft = Draft(hidden, tensors[UP].shape[0], max(1, tensors[DOWN].shape[0] // hidden)).eval()
    check_made_for(file, tensors, draft, "draft")
    inputs = tuple(Tensor(name=name, dtype="float32", dims=(BATCH, 1, hidden)) for name in (HIDDEN, "inputs_embeds"))
    logits = Tensor(name="logits", dtype="float32", dims=(BATCH, draft.heads, text.vocab_size))
    signature = Signature(inputs=inputs, outputs=(logits,))
    components = (component, Component(KIND, draft, file))
    return [Part(SUBMODEL, components, Drafting(draft, head), _plain(draft, head), signature, activations=False)]


def _plain(draft: Draft, head: Any) -> Reference:
    """The same head by head: no library has such a network."""

    def forward(states: TorchTensor, embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        up = draft.up(torch.cat([states, embeds], dim=-1))
        changed = draft.down(up * torch.sigmoid(up)).split(draft.hidden, dim=-1)
        return (torch.cat([head(states + one) for one in changed], dim=1),)

    return forward
