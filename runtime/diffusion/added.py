"""Added conditions: what a denoiser receives besides the hidden states of a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays
from runtime.errors import InvalidInput

Pair = tuple[int, int]


class AddedConditions(Frozen):
    """Those of Stable Diffusion XL: a pooled prompt, and sizes (Podell et al. 2023, section 2.2; arXiv 2307.01952).

    With `force_zeros_for_empty_prompt`, of the model's model_index.json, an empty negative prompt is zeros, not the
    encoding of an empty text.
    """

    force_zeros_for_empty_prompt: bool


def time_ids(added: AddedConditions | None, sizes: Mapping[str, Pair], drawn: Pair, rows: int) -> Arrays:
    """The sizes for each of `rows` rows of a batch: `time_ids` float32 [rows, 6], in pixels. Empty where the model has
    no added conditions.

    `sizes` are those that the request states, by the names of its fields; `drawn` is the picture's (height, width).
    Raises InvalidInput naming the first field where the model takes none.
    """
    if added is None:
        for field in sizes:
            raise InvalidInput(field, "does not apply to this model, which has no such condition: leave it out")
        return {}
    original, aim = sizes.get("original_size", drawn), sizes.get("target_size", drawn)
    row = np.array([*original, *sizes.get("crop_top_left", (0, 0)), *aim], np.float32)
    return {"time_ids": np.tile(row, (rows, 1))}
