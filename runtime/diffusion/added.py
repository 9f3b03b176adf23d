"""Added conditions: what a denoiser receives besides the hidden states of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays
from runtime.diffusion.schedule import Latents
from runtime.errors import InvalidInput
from runtime.tasks.image import CONDITIONS

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


def conditions_of(added: AddedConditions | None) -> tuple[str, ...]:
    """The fields of a request with conditions that a model takes (`ImageRequest.conditions`)."""
    if added is None:
        return ()
    other = "target_size" if added.aesthetic else "aesthetic_score"
    return tuple(name for name in CONDITIONS if not name.endswith(other))


def time_ids(added: AddedConditions | None, stated: Mapping[str, Condition], drawn: Pair, rows: int) -> Arrays:
    """The sizes for each of `rows` rows of a batch, the prompt's last: `time_ids` float32 [rows, 6], in pixels; of a
    model with scores [rows, 5]. Empty where the model has no added conditions.

    `stated` are those of the request (`ImageRequest.conditions`); `drawn` is the picture's (height, width). What is not
    stated of the negative prompt is as of the prompt, but for the score. Raises InvalidInput naming the first field
    that the model does not take.
    """
    for field in (field for field in stated if field not in conditions_of(added)):
        has = "has no such condition" if added is None else "takes a score instead"
        has = "takes a target_size instead" if added is not None and not added.aesthetic else has
        raise InvalidInput(field, f"does not apply to this model, which {has}: leave it out")
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
