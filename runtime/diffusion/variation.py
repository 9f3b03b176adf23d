"""Noise that differs from that of a seed only a little, or keeps its place in pictures of another size: variation seeds
and "resize seed from" of Automatic1111's web UI (its rng.py, slerp and ImageRNG.first).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from runtime.diffusion.schedule import Latents

PARALLEL: Final = 0.9995
"""From this cosine on, noises are mixed along a line."""
LEAST_SINE: Final = 1e-4
"""Columns with a smaller sine of their angle are, too: they have no turn between them that float32 can express."""


@dataclass(frozen=True)
class Variation:
    """The share `strength`, 0 to 1, of the noise of another `seed`. With `shape` (height and width of latents), the
    noise of both is drawn for that shape and lies in the middle.
    """

    seed: int = 0
    strength: float = 0.0
    shape: tuple[int, int] | None = None

    def of(self, index: int) -> Variation:
        """That of picture `index`."""
        return replace(self, seed=self.seed + index)

    def varied(self, noise: Latents, seed: int) -> Latents:
        """The noise [1, channels, height, width] to begin with, from that of a seed."""
        own = noise.shape[-2:] if self.shape is None else self.shape
        shape = (*noise.shape[:2], *own)
        small = noise if shape == noise.shape else _drawn(seed, shape)
        if self.strength:
            small = slerp(self.strength, small[0], _drawn(self.seed, shape)[0])[None]
        return small if shape == noise.shape else _in_the_middle(small, noise)


def slerp(share: float, low: Latents, high: Latents) -> Latents:
    """Between two noises [channels, height, width], `share` of the way from the first to the second. Each column of a
    channel is turned for itself, as the web UI does it.
    """
    unit_low, unit_high = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (low, high))
    cosine = (unit_low * unit_high).sum(axis=1, keepdims=True)
    if cosine.mean() > PARALLEL:
        return np.asarray(low * share + high * (1 - share), np.float32)  # the web UI's order
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.sin(angle)
    turns = sine > LEAST_SINE
    turned = (np.sin((1 - share) * angle) * low + np.sin(share * angle) * high) / np.where(turns, sine, 1)
    return np.asarray(np.where(turns, turned, low * (1 - share) + high * share), np.float32)


def _drawn(seed: int, shape: tuple[int, ...]) -> Latents:
    return random_stream(seed).standard_normal(shape, np.float32)


def random_stream(seed: int) -> np.random.Generator:
    """The random numbers of one picture: numpy's Philox with the seed as its key. First the starting latents, then each
    step's noise.
    """
    return np.random.Generator(np.random.Philox(key=seed))


def _in_the_middle(small: Latents, noise: Latents) -> Latents:
    """The noise with another one in its middle, which is cut where it is larger."""
    places = [_part(own, length) for own, length in zip(small.shape[2:], noise.shape[2:], strict=True)]
    (below, beside), (down, across) = zip(*places, strict=True)
    found = noise.copy()
    found[:, :, below, beside] = small[:, :, down, across]
    return found


def _part(own: int, length: int) -> tuple[slice, slice]:
    """Where so many values lie in the middle of a length, and which of them do."""
    before = (length - own) // 2
    count, to, of = own + 2 * min(before, 0), max(before, 0), max(-before, 0)
    return slice(to, to + count), slice(of, of + count)
