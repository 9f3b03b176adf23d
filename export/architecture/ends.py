"""Where CLIP reads a text: at its end token (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor as TorchTensor

LEGACY_END: Final = 2
"""The end token of configs that name a wrong one: the token of the highest number ends a text (CLIPTextModel)."""


def at_end(states: TorchTensor, input_ids: TorchTensor, end: int) -> TorchTensor:
    """The states [batch, sequence, hidden] at the first end token of each row, at the first token where there is none.

    Selected by a product with ones and zeros: ONNX Runtime has no kernels for CUDA of the library's ArgMax of integers
    and its lookup.
    """
    ids, length = input_ids.int(), input_ids.shape[-1]
    ends = ids == (ids.amax(-1, keepdim=True) if end == LEGACY_END else end)
    order = torch.arange(length, dtype=torch.float32, device=states.device) - length * ends.float()
    chosen = (order == order.amin(-1, keepdim=True)).float()
    return (chosen.unsqueeze(1) @ states).squeeze(1)
