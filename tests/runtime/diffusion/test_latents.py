"""Latents: their scale, their noise and the picture they become, whole or in tiles."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.diffusion.calls import Part
from runtime.diffusion.latents import Vae, decode, noises
from runtime.diffusion.schedule import Latents
from runtime.errors import InvalidInput
from runtime.pipeline import Call

SHAPE = (1, 4, 40, 24)


def decoded(latents: Latents, most: float) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """The picture, and the shape of each call; the decoder repeats the first three channels."""
    shapes: list[tuple[int, ...]] = []

    def decoder(part: Latents) -> Part[Latents]:
        yield Call("decoder", {"latents": part})
        shapes.append(part.shape)
        return np.asarray(part[0, :3].repeat(2, axis=1).repeat(2, axis=2))

    work = decode(latents, decoder, 2, most)
    try:
        next(work)
        while True:
            work.send({})
    except StopIteration as end:
        return end.value, shapes


def test_a_picture_is_the_same_in_tiles() -> None:
    """With a decoder that sees one latent at a time, up to rounding."""
    latents = np.random.default_rng(0).uniform(-1.2, 1.2, SHAPE).astype(np.float32)
    whole, calls = decoded(latents, 40 * 24)
    tiled, several = decoded(latents, 16 * 20)
    assert whole.shape == (80, 48, 3) and whole.dtype == np.uint8 and calls == [SHAPE]
    assert len(several) > 1 and all(shape[2] * shape[3] <= 16 * 20 for shape in several)
    assert np.abs(whole.astype(int) - tiled).max() <= 1
    assert whole.min() == 0 and whole.max() == 255


def test_scale_and_shape() -> None:
    vae = Vae(scaling_factor=0.5, shift_factor=0.25, scale_factor=8, latent_channels=16)
    assert vae.shape(64, 32) == (1, 16, 8, 4)
    assert vae.unscaled(np.ones(2, np.float32)).tolist() == [2.25, 2.25]


def test_every_picture_has_noise_of_its_own_seed() -> None:
    first, second = noises(5, 2, SHAPE)
    (alone,) = noises(6, 1, SHAPE)
    assert (first.seed, second.seed) == (5, 6)
    np.testing.assert_array_equal(second.start(), alone.start())
    assert (first.start() != second.fresh()).any()


def test_given_latents_replace_only_the_start() -> None:
    given = np.zeros((2, *SHAPE[1:]), np.float32)
    noise = noises(5, 2, SHAPE, given)[0]
    (drawn,) = noises(5, 1, SHAPE)
    drawn.start()
    assert noise.start().shape == SHAPE and not noise.start().any()
    (again,) = noises(5, 1, SHAPE)
    again.start(), again.start()
    np.testing.assert_array_equal(noise.fresh(), again.fresh())


@pytest.mark.parametrize("given", [np.zeros(SHAPE), np.full(SHAPE, np.inf, np.float32), np.zeros((2, 1), np.float32)])
def test_latents_of_another_kind_are_refused(given: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="expected finite float32") as caught:
        noises(5, 1, SHAPE, given)
    assert caught.value.field == "latents"
