"""Latents at other sizes, as torch's `interpolate` makes them."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.diffusion.labels import UPSCALERS as LABELS
from runtime.vision.enlarging import LATENTS, UPSCALERS, enlarged

MODES = {
    "latent": ("bilinear", False),
    "latent_antialiased": ("bilinear", True),
    "latent_bicubic": ("bicubic", False),
    "latent_bicubic_antialiased": ("bicubic", True),
    "latent_nearest": ("nearest", False),
    "latent_nearest_exact": ("nearest-exact", False),
}
"""The modes of the web UI's latent upscalers (its modules/shared_items.py)."""


@pytest.mark.parametrize("size", [(16, 24), (13, 17), (6, 12)])
@pytest.mark.parametrize("way", LATENTS)
def test_latents_as_in_torch(way: str, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 12), np.float32)
    mode, antialias = MODES[way]
    tensor = torch.from_numpy(latents)
    expected = torch.nn.functional.interpolate(tensor, size=size, mode=mode, antialias=antialias).numpy()
    found = enlarged(latents, size, way)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_way_has_a_label() -> None:
    assert LABELS.keys() == set(UPSCALERS)
