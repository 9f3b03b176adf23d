"""Added conditions: what a denoiser receives besides the hidden states of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays
from runtime.errors import InvalidInput

Pair = tuple[int, int]
SCORES: Final = [(2.5,), (6.0,)]
"""Scores of the negative prompt and of the prompt, as diffusers' StableDiffusionXLImg2ImgPipeline has them."""


class AddedConditions(Frozen):
    """Those of Stable Diffusion XL: a pooled prompt, and sizes (Podell et al. 2023, section 2.2; arXiv 2307.01952).

    With `force_zeros_for_empty_prompt`, of the model's model_index.json, an empty negative prompt is zeros, not the
    encoding of an empty text. `text_encoders` are those that the model has. With `aesthetic`, as the refiner, it takes
    a score of the picture's beauty in place of the intended size (`requires_aesthetics_score` in model_index.json).
    """

    force_zeros_for_empty_prompt: bool
    text_encoders: tuple[Literal["text_encoder", "text_encoder_2"], ...] = ("text_encoder", "text_encoder_2")
    aesthetic: bool = False


def time_ids(added: AddedConditions | None, sizes: Mapping[str, Pair], drawn: Pair, rows: int) -> Arrays:
    """The sizes for each of `rows` rows of a batch, the prompt's last: `time_ids` float32 [rows, 6], in pixels; of a
    model with scores [rows, 5]. Empty where the model has no added conditions.

    `sizes` are those that the request states, by the names of its fields; `drawn` is the picture's (height, width).
    Raises InvalidInput naming the first field where the model takes none.
    """
    if added is None:
        for field in sizes:
            raise InvalidInput(field, "does not apply to this model, which has no such condition: leave it out")
        return {}
    if added.aesthetic and "target_size" in sizes:
        raise InvalidInput("target_size", "does not apply to this model, which takes a score instead: leave it out")
    shown = [*sizes.get("original_size", drawn), *sizes.get("crop_top_left", (0, 0))]
    ends = SCORES if added.aesthetic else [sizes.get("target_size", drawn)] * 2
    return {"time_ids": np.array([[*shown, *end] for end in ends[-rows:]], np.float32)}
