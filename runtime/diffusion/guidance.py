"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the model predicts for the prompt and for the
negative prompt in one batch, and the result is pushed from the second to the first. In steps without guidance it
predicts for the prompt alone (Kynkäänniemi et al. 2024, arXiv 2404.07724).

A model that was distilled from guided predictions (Meng et al. 2023, arXiv 2210.03142; latent consistency models, Luo
et al. 2023, arXiv 2310.04378) receives the scale as an input instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from runtime.diffusion.calls import Arrays
from runtime.diffusion.schedule import Latents


@dataclass(frozen=True)
class Guidance:
    """The guidance scale. Up to a `scale` of 1 there is no guidance, and no negative prompt in the batch; nor is there
    where the model receives the scale itself, as an embedding of `width` numbers (0: it does not).

    It counts in the steps from the share `start` to the share `end` of all, both rounded down to whole steps.
    """

    scale: float
    width: int = 0
    start: float = 0.0
    end: float = 1.0

    @property
    def guided(self) -> bool:
        return self.scale > 1 and not self.width

    @property
    def rows(self) -> int:
        """Rows of a batch: the negative prompt's, where there is guidance, then the prompt's."""
        return 1 + self.guided

    def at(self, step: int, steps: int) -> Guidance:
        """That of one of so many steps: none outside of the interval. Equals ClassifierFreeGuidance of diffusers."""
        within = int(self.start * steps) <= step < int(self.end * steps)
        return self if within or not self.guided else replace(self, scale=1.0)

    def of_rows(self, conditions: Arrays) -> Arrays:
        """The rows of a batch of conditions, of which the prompt's is the last."""
        return {name: array[-self.rows :] for name, array in conditions.items()}

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
