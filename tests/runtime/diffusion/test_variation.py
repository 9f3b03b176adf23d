"""Variation seeds and noise of another size, as Automatic1111's web UI computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.diffusion.latents import noises
from runtime.diffusion.variation import Variation, random_stream, slerp
from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest

SHAPE = (1, 4, 8, 12)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Any:
    return random_stream(seed).standard_normal(shape, np.float32)


def published(torch: Any, share: float, low: Any, high: Any) -> Any:
    """The formula of the web UI's rng.py, as published."""
    unit_low = low / torch.norm(low, dim=1, keepdim=True)
    unit_high = high / torch.norm(high, dim=1, keepdim=True)
    dot = (unit_low * unit_high).sum(1)
    assert dot.mean() <= 0.9995
    omega = torch.acos(dot)
    return (torch.sin((1.0 - share) * omega) / torch.sin(omega)).unsqueeze(1) * low + (
        torch.sin(share * omega) / torch.sin(omega)
    ).unsqueeze(1) * high


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_noises_are_mixed_by_the_published_formula(share: float) -> None:
    torch = pytest.importorskip("torch")
    low, high = noise(1)[0], noise(2)[0]
    expected = published(torch, share, torch.from_numpy(low), torch.from_numpy(high)).numpy()
    np.testing.assert_allclose(slerp(share, low, high), expected, atol=1e-5)


def test_the_same_noise_stays_and_short_columns_are_mixed() -> None:
    low = noise(1)[0]
    np.testing.assert_allclose(slerp(0.3, low, low), low, atol=1e-6)
    low, high = noise(1, (1, 4, 1, 8))[0], noise(2, (1, 4, 1, 8))[0]
    np.testing.assert_allclose(slerp(0.5, low, high), (low + high) / 2, atol=1e-6)


def test_pictures_keep_the_seed_and_differ_in_the_variation() -> None:
    first, second = noises(5, 2, SHAPE, variation=Variation(9, 0.2))
    assert (first.seed, second.seed) == (5, 5)
    np.testing.assert_array_equal(first.start(), slerp(0.2, noise(5)[0], noise(9)[0])[None])
    np.testing.assert_array_equal(second.start(), slerp(0.2, noise(5)[0], noise(10)[0])[None])
    plain = noises(5, 1, SHAPE)[0]
    plain.start()
    np.testing.assert_array_equal(first.fresh(), plain.fresh(), "further noise is that of the seed")


def test_noise_of_a_smaller_and_of_a_larger_size_lies_in_the_middle() -> None:
    small = noises(5, 1, SHAPE, variation=Variation(shape=(4, 8)))[0].start()
    np.testing.assert_array_equal(small[:, :, 2:6, 2:10], noise(5, (1, 4, 4, 8)))
    np.testing.assert_array_equal(small[:, :, :2], noise(5)[:, :, :2])
    large = noises(5, 1, SHAPE, variation=Variation(9, 0.5, (12, 12)))[0].start()
    mixed = slerp(0.5, noise(5, (1, 4, 12, 12))[0], noise(9, (1, 4, 12, 12))[0])
    np.testing.assert_array_equal(large[0], mixed[:, 2:10])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variation_seed": 1}, "variation_seed: and variation_strength belong together"),
        ({"variation_seed": 1, "variation_strength": 1.5}, "variation_strength: is 1.5, expected 0 to 1"),
        ({"variation_seed": -1, "variation_strength": 1}, "variation_seed: is -1, expected"),
        ({"noise_size": (8,)}, "noise_size: has 1 lengths, expected height and width"),
        ({"noise_size": (8, 8), "latents": noise(1)}, "noise_size: changes the noise that is drawn, which latents"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ImageRequest("x", **fields)


def test_one_picture_of_several() -> None:
    plain = ImageRequest("x", images=3).single(2, 7)
    assert (plain.images, plain.seed, plain.variation_seed) == (1, 9, None)
    varied = ImageRequest("x", images=3, variation_seed=4, variation_strength=0.1).single(2, 7)
    assert (varied.images, varied.seed, varied.variation_seed) == (1, 7, 6)
