"""How pictures and latents get a larger size: the ways of Automatic1111's web UI that need no model of their own.

Those of latents are torch's `interpolate` (its modules shared_items.py and processing.py), those of pictures Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Weights = NDArray[np.float64]
"""How much of each old value is in each new one, [new, old]."""
Kernel = Callable[[Weights], Weights]
"""The weight of a value at a distance."""
SHARP, SOFT = -0.75, -0.5
"""The parameter of cubic interpolation, without and with antialiasing."""


def _linear(distance: Weights) -> Weights:
    return np.asarray(np.maximum(0, 1 - np.abs(distance)))


def _cubic(a: float, distance: Weights) -> Weights:
    """Keys 1981, equation (15)."""
    x = np.abs(distance)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _centers(old: int, new: int) -> Weights:
    """Where new values lie among old ones."""
    return np.asarray((np.arange(new) + 0.5) * (old / new) - 0.5, np.float64)


def _plain(kernel: Kernel, old: int, new: int) -> Weights:
    """Values beyond an edge are those at the edge."""
    places = np.arange(-2, old + 2)
    weights = kernel(places - _centers(old, new)[:, None])
    return np.asarray(weights @ (np.clip(places, 0, old - 1)[:, None] == np.arange(old)))


def _antialiased(kernel: Kernel, old: int, new: int) -> Weights:
    """Where there are fewer values than before, each is a mean of several. None lie beyond an edge."""
    weights = kernel((np.arange(old) - _centers(old, new)[:, None]) / max(1, old / new))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _nearest(shift: float, old: int, new: int) -> Weights:
    places = np.floor((np.arange(new) + shift) * (old / new)).astype(int)
    return np.asarray(np.clip(places, 0, old - 1)[:, None] == np.arange(old), np.float64)


LATENTS: Final[Mapping[str, Callable[[int, int], Weights]]] = {
    "latent": partial(_plain, _linear),
    "latent_antialiased": partial(_antialiased, _linear),
    "latent_bicubic": partial(_plain, partial(_cubic, SHARP)),
    "latent_bicubic_antialiased": partial(_antialiased, partial(_cubic, SOFT)),
    "latent_nearest": partial(_nearest, 0.0),
    "latent_nearest_exact": partial(_nearest, 0.5),
}
"""The ways of latents by name."""
PICTURES: Final[Mapping[str, Image.Resampling]] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
"""The ways of pictures by name."""
UPSCALERS: Final = (*LATENTS, *PICTURES)


def enlarged(latents: NDArray[np.float32], size: tuple[int, int], way: str) -> NDArray[np.float32]:
    """Latents [..., height, width] at another `size` (height, width), by one of the ways of `LATENTS`."""
    rows, columns = (LATENTS[way](*pair) for pair in zip(latents.shape[-2:], size, strict=True))
    return np.asarray(rows @ latents @ columns.T, np.float32)
