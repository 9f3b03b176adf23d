"""Where CLIP reads a text: at its end token (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor as TorchTensor

LEGACY_END: Final = 2
"""The end token of configs that name a wrong one: the token of the highest number ends a text (CLIPTextModel)."""


def at_end(states: TorchTensor, input_ids: TorchTensor, end: int) -> TorchTensor:
    """The states [batch, sequence, hidden] at the first end token of each row, at the first token where there is none.

    The place is the one that no other is before, in the order of ids and then of places, and its states are selected by
    a product: ONNX Runtime has no kernels for CUDA of ArgMax and ReduceMax of integers and of GatherND.
    """
    ids, length = input_ids.int(), input_ids.shape[-1]
    marked = ids if end == LEGACY_END else (ids == end).int()
    order = marked * length - torch.arange(length, dtype=torch.int32, device=states.device)
    before = (order.unsqueeze(-2) > order.unsqueeze(-1)).float().sum(-1)
    return ((before == 0).float().unsqueeze(-2) @ states).squeeze(-2)
