"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the model predicts for the prompt and for the
negative prompt in one batch, and the result is pushed from the second to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.diffusion.schedule import Latents


@dataclass(frozen=True)
class Guidance:
    """The guidance scale. Up to a `scale` of 1 there is no guidance, and no negative prompt in the batch."""

    scale: float

    @property
    def guided(self) -> bool:
        return self.scale > 1

    @property
    def rows(self) -> int:
        """Rows of a batch: the negative prompt's, where there is guidance, then the prompt's."""
        return 1 + self.guided

    def batch(self, x: Latents) -> Latents:
        """Latents [1, ...] for every row of the batch."""
        return np.repeat(x, self.rows, axis=0)

    def combine(self, output: Latents) -> Latents:
        """The guided prediction [1, ...] of a batch of predictions."""
        if not self.guided:
            return output
        negative, positive = output[:1], output[1:]
        return np.asarray(negative + self.scale * (positive - negative), np.float32)
