"""The figures of the quality report: known values, other libraries' values, and what must hold whatever the numbers
are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from calibration.observe.metrics import (
    CAP_DB,
    CAP_PERPLEXITY,
    PEAK,
    Comparison,
    cosine,
    gmsd,
    kl_divergence,
    log_softmax,
    perplexity,
    psnr_db,
    snr_db,
    ssim,
    token_agreement,
)
from runtime.errors import InvalidInput

VECTORS = arrays(np.float32, st.integers(1, 30), elements=st.floats(-(2.0**100), 2.0**100, width=32))
LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32))
PICTURES = arrays(np.uint8, (12, 13, 3))
TOKENS = st.lists(st.integers(0, 3), max_size=6)


def noisy(seed: int = 0) -> tuple[Any, Any]:
    """A picture and the same with noise."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (24, 20, 3)).astype(np.uint8)
    return picture, np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)


def test_known_decibels() -> None:
    one = np.array([3.0, -4.0], np.float32)
    assert snr_db(one, one * np.float32(1.1)) == pytest.approx(20, abs=1e-4), (
        "a tenth of the amplitude is a hundredth of the power"
    )
    assert psnr_db(one, one + np.float32(0.4)) == pytest.approx(20, abs=1e-4), "the peak is the largest magnitude"
    assert psnr_db(one, one + 1, peak=10) == pytest.approx(20)
    assert psnr_db(*noisy(), peak=PEAK) == pytest.approx(peak_signal_noise_ratio(*noisy()), abs=1e-9)


@given(VECTORS)
def test_no_difference(values: Any) -> None:
    assert snr_db(values, values) == psnr_db(values, values) == CAP_DB
    assert cosine(values, values) == 1


@given(VECTORS, st.integers(0, 2**32 - 1))
def test_figures_are_finite_and_in_range(values: Any, seed: int) -> None:
    other = (values * np.random.default_rng(seed).normal(1, 0.5, values.shape)).astype(np.float32)
    assert all(-CAP_DB <= figure <= CAP_DB for figure in (snr_db(values, other), psnr_db(values, other)))
    assert -1 <= cosine(values, other) <= 1
    assert cosine(values, other) == cosine(other, values)


def test_zeros() -> None:
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert (snr_db(zeros, ones), psnr_db(zeros, ones), cosine(zeros, ones)) == (-CAP_DB, -CAP_DB, 0)
    assert (snr_db(ones, zeros), cosine(ones, zeros), cosine(ones, -ones)) == (0, 0, pytest.approx(-1))


@given(arrays(np.float32, (4, 3), elements=st.floats(-100, 100, width=32)), st.integers(0, 2**32 - 1))
def test_parts_compare_as_the_whole(values: Any, seed: int) -> None:
    other = (values + np.random.default_rng(seed).normal(size=values.shape)).astype(np.float32)
    parts = Comparison()
    for r, m in zip(values, other, strict=True):
        parts.add(r, m)
    assert parts.snr_db == pytest.approx(snr_db(values, other))
    assert parts.psnr_db() == pytest.approx(psnr_db(values, other))
    assert parts.cosine == pytest.approx(cosine(values, other))


def test_cosine_is_torchs() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 50)).astype(np.float32)
    expected = torch.nn.functional.cosine_similarity(torch.from_numpy(one), torch.from_numpy(other), dim=0)
    assert cosine(one, other) == pytest.approx(float(expected), abs=1e-6)


def test_ssim_is_that_of_the_paper() -> None:
    one, other = noisy()
    assert ssim(one, one) == 1
    assert 0.5 < ssim(one, other) < 1
    channels = [
        structural_similarity(
            one[..., i], other[..., i], data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for i in range(3)
    ]
    assert ssim(one, other) == pytest.approx(np.mean(channels))
    flat = [np.full((16, 16, 3), value, np.uint8) for value in (100, 150)]
    constant = (0.01 * 255) ** 2
    assert ssim(*flat) == pytest.approx((2 * 100 * 150 + constant) / (100**2 + 150**2 + constant)), (
        "without variance, means are left"
    )


@given(PICTURES, PICTURES)
def test_ssim_is_symmetric_and_in_range(one: Any, other: Any) -> None:
    assert -1 <= ssim(one, other) <= 1
    assert ssim(one, other) == pytest.approx(ssim(other, one), abs=1e-12)


def test_gmsd_is_that_of_the_paper() -> None:
    """Its formulas 1 to 5, by convolutions: Prewitt over 3, means of 2 x 2 pixels, c = 170."""
    one, other = noisy()
    kernel = np.array([[1, 0, -1]] * 3) / 3

    def gradients(picture: Any) -> Any:
        grey = convolve2d(picture @ np.array([0.299, 0.587, 0.114]), np.full((2, 2), 0.25), "valid")[::2, ::2]
        return np.hypot(convolve2d(grey, kernel, "valid"), convolve2d(grey, kernel.T, "valid"))

    r, m = gradients(one), gradients(other)
    assert gmsd(one, other) == pytest.approx(np.std((2 * r * m + 170) / (r**2 + m**2 + 170)), abs=1e-12)
    assert 0.01 < gmsd(one, other) < 0.5


@given(PICTURES, PICTURES)
def test_gmsd_is_symmetric_and_in_range(one: Any, other: Any) -> None:
    assert gmsd(one, other) == pytest.approx(gmsd(other, one)) and 0 <= gmsd(one, other) <= 0.5
    assert gmsd(one, one) == 0


def test_more_noise_is_a_larger_distance() -> None:
    picture, _ = noisy()
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, picture.shape)
    found = [gmsd(picture, np.asarray((picture + level * noise).clip(0, 255), np.uint8)) for level in (2, 8, 32)]
    assert found == sorted(found)


def test_known_divergence_and_perplexity() -> None:
    even, biased = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    assert kl_divergence(even, biased) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert kl_divergence(np.vstack([even, biased]), np.vstack([biased, biased])) == pytest.approx(
        kl_divergence(even, biased) / 2
    )
    assert perplexity(biased, [1]) == pytest.approx(4)
    assert perplexity(np.zeros((3, 7), np.float32), [0, 3, 6]) == pytest.approx(7), (
        "even odds: the size of the vocabulary"
    )
    assert perplexity(np.array([[0.0, 1e9]], np.float32), [0]) == pytest.approx(CAP_PERPLEXITY)


@given(LOGITS, LOGITS, st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_divergence_and_perplexity_are_torchs(one: Any, other: Any, tokens: list[int]) -> None:
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), dim=1) for logits in (one, other))
    assert log_softmax(one) == pytest.approx(p.numpy(), abs=1e-9)
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert kl_divergence(one, other) == pytest.approx(float(expected), abs=1e-9)
    assert kl_divergence(one, one) == 0
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(one).double(), torch.tensor(tokens))
    assert perplexity(one, tokens) == pytest.approx(min(math.exp(float(loss)), CAP_PERPLEXITY), rel=1e-6)


@given(TOKENS, TOKENS)
def test_agreement(one: list[int], other: list[int]) -> None:
    assert token_agreement(one, one) == 1
    assert 0 <= token_agreement(one, other) == token_agreement(other, one) <= 1


def test_what_is_missing_at_the_end_disagrees() -> None:
    assert token_agreement([1, 2, 3, 4], [1, 2]) == 0.5
    assert token_agreement([1, 2, 3, 4], [1, 0, 3, 4]) == 0.75
    assert token_agreement([], []) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: snr_db(np.ones(2), np.ones(3)), "measured: has shape"),
        (lambda: cosine(np.ones(2), np.array([1, np.nan])), "measured: holds NaN"),
        (lambda: psnr_db(np.array([np.inf]), np.ones(1)), "reference: holds NaN"),
        (lambda: ssim(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)), "at least 11 pixels"),
        (lambda: ssim(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 17, 3), np.uint8)), "expected one size"),
        (lambda: ssim(np.zeros((16, 16, 3)), np.zeros((16, 16, 3))), "reference: has dtype"),
        (lambda: gmsd(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)), "at least 11 pixels"),
        (lambda: kl_divergence(np.zeros((1, 2)), np.zeros((2, 2))), "measured: has shape"),
        (lambda: kl_divergence(np.zeros((0, 2)), np.zeros((0, 2))), "reference: has shape"),
        (lambda: perplexity(np.array([[0, np.nan]]), [0]), "logits: holds NaN"),
        (lambda: perplexity(np.zeros((1, 2)), [2]), "tokens: are 1"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()
