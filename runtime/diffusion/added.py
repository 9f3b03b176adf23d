"""Added conditions: what a denoiser receives besides the hidden states of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays
from runtime.diffusion.schedule import Latents
from runtime.errors import InvalidInput

Pair = tuple[int, int]
Condition = Pair | float
SCORES: Final = (2.5, 6.0)
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


def time_ids(added: AddedConditions | None, stated: Mapping[str, Condition], drawn: Pair, rows: int) -> Arrays:
    """The sizes for each of `rows` rows of a batch, the prompt's last: `time_ids` float32 [rows, 6], in pixels; of a
    model with scores [rows, 5]. Empty where the model has no added conditions.

    `stated` are those of the request (`ImageRequest.conditions`); `drawn` is the picture's (height, width). What is not
    stated of the negative prompt is as of the prompt, but for the score. Raises InvalidInput naming the first field
    that the model does not take.
    """
    for field in stated:
        if added is None:
            raise InvalidInput(field, "does not apply to this model, which has no such condition: leave it out")
        if field.endswith("target_size") and added.aesthetic:
            raise InvalidInput(field, "does not apply to this model, which takes a score instead: leave it out")
        if field.endswith("aesthetic_score") and not added.aesthetic:
            raise InvalidInput(field, "does not apply to this model, which takes a target_size instead: leave it out")
    if added is None:
        return {}
    usual: dict[str, Condition] = {
        "original_size": drawn,
        "crop_top_left": (0, 0),
        "target_size": drawn,
        "aesthetic_score": SCORES[1],
    }
    positive = {**usual, **stated}
    negative = {name: stated.get(f"negative_{name}", positive[name]) for name in usual}
    negative["aesthetic_score"] = stated.get("negative_aesthetic_score", SCORES[0])
    return {"time_ids": np.stack([_row(added, values) for values in (negative, positive)[-rows:]])}


def _row(added: AddedConditions, values: Mapping[str, Condition]) -> Latents:
    names = ("original_size", "crop_top_left", "aesthetic_score" if added.aesthetic else "target_size")
    return np.concatenate([np.atleast_1d(np.array(values[name], np.float32)) for name in names])
