"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the model predicts for the prompt and for the
negative prompt in one batch, and the result is pushed from the second to the first.

A model that was distilled from guided predictions (Meng et al. 2023, arXiv 2210.03142; latent consistency models, Luo
et al. 2023, arXiv 2310.04378) receives the scale as an input instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtime.diffusion.calls import Arrays
from runtime.diffusion.schedule import Latents


@dataclass(frozen=True)
class Guidance:
    """The guidance scale. Up to a `scale` of 1 there is no guidance, and no negative prompt in the batch; nor is there
    where the model receives the scale itself, as an embedding of `width` numbers (0: it does not).
    """

    scale: float
    width: int = 0

    @property
    def guided(self) -> bool:
        return self.scale > 1 and not self.width

    @property
    def rows(self) -> int:
        """Rows of a batch: the negative prompt's, where there is guidance, then the prompt's."""
        return 1 + self.guided

    @property
    def conditions(self) -> Arrays:
        """What the model receives of the scale: `timestep_cond` float32 [rows, width], or nothing."""
        return {"timestep_cond": embedding(self.scale - 1, self.width)} if self.width else {}

    def batch(self, x: Latents) -> Latents:
        """Latents [1, ...] for every row of the batch."""
        return np.repeat(x, self.rows, axis=0)

    def combine(self, output: Latents) -> Latents:
        """The guided prediction [1, ...] of a batch of predictions."""
        if not self.guided:
            return output
        negative, positive = output[:1], output[1:]
        return np.asarray(negative + self.scale * (positive - negative), np.float32)


def embedding(weight: float, width: int) -> Latents:
    """Sines and cosines of a thousand times the weight, float32 [1, width]
    (LatentConsistencyModelPipeline.get_guidance_scale_embedding of diffusers). The last number of an odd width is 0.
    """
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1)))
    angles = np.float32(weight) * np.float32(1000) * frequencies
    numbers = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return np.asarray(numbers[np.newaxis], np.float32)
