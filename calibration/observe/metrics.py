"""How near one array, picture or next-token distribution is to another: the figures of the quality report. Knows
numbers, no model.

Arrays are float32 or narrower; sums are float64. Decibels are capped at `CAP_DB`, which also stands for no difference
at all, so that every figure is finite and can be stored as JSON. LPIPS (Zhang et al. 2018, arXiv 1801.03924) is not
here: it is defined by the weights of a network trained on ImageNet, which its libraries download when first used;
`gmsd` stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InvalidInput
from runtime.optional import require
from runtime.vision.images import Picture, check_picture

Numbers = NDArray[np.generic]
Logits = NDArray[np.floating[Any]]

CAP_DB: Final = 300.0
CAP_PERPLEXITY: Final = 1e12
PEAK: Final = 255.0
"""The largest value of a picture's channel."""
SSIM_SIGMA: Final = 1.5
SSIM_EDGE: Final = 11
"""Pixels: the window of Wang et al., and so the least height and width of a picture."""
LUMA: Final = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luminance (ITU-R BT.601)."""
GRADIENT_FLOOR: Final = 170.0
"""Added to both sides of a gradient's similarity (Xue et al., c for levels up to 255), so that it tells little where
nothing happens.
"""


class Comparison:
    """Reference arrays and what was measured in their place, compared as one long vector: r and m of n numbers.

    Add pairs one after another; no array is kept.
    """

    def __init__(self) -> None:
        self.count = 0
        self.peak = 0.0
        self._signal = self._power = self._product = self._noise = 0.0

    def add(self, reference: Numbers, measured: Numbers) -> Comparison:
        """Take in one pair of one shape; returns itself. Raises InvalidInput when shapes differ or a number is not
        finite.
        """
        if reference.shape != measured.shape:
            raise InvalidInput(
                "measured", f"has shape {list(measured.shape)}, expected {list(reference.shape)} as the reference"
            )
        r, m = (np.asarray(array, np.float64).ravel() for array in (reference, measured))
        for name, array in (("reference", r), ("measured", m)):
            if not np.isfinite(array).all():
                raise InvalidInput(name, "holds NaN or infinity, expected finite numbers")
        self.count += r.size
        self.peak = max(self.peak, float(np.abs(r).max(initial=0)))
        self._signal += float(r @ r)
        self._power += float(m @ m)
        self._product += float(r @ m)
        self._noise += float((r - m) @ (r - m))
        return self

    @property
    def snr_db(self) -> float:
        """Signal to noise ratio, 10 log10(sum r^2 / sum (r - m)^2), in dB."""
        return _decibels(self._signal, self._noise)

    def psnr_db(self, peak: float | None = None) -> float:
        """Peak signal to noise ratio, 10 log10(peak^2 / mean (r - m)^2), in dB. `peak` is by default the
        largest |r|.
        """
        return _decibels((self.peak if peak is None else peak) ** 2 * self.count, self._noise)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, r m / (|r| |m|), -1 to 1; 1 when both are zero, 0 when one is."""
        if self._noise == 0:
            return 1.0
        lengths = math.sqrt(self._signal) * math.sqrt(self._power)
        return min(max(self._product / lengths, -1.0), 1.0) if lengths else 0.0


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return CAP_DB
    if signal == 0:
        return -CAP_DB
    return min(max(10 * (math.log10(signal) - math.log10(noise)), -CAP_DB), CAP_DB)


def snr_db(reference: Numbers, measured: Numbers) -> float:
    """Signal to noise ratio of two arrays of one shape, in dB: see `Comparison.snr_db`."""
    return Comparison().add(reference, measured).snr_db


def psnr_db(reference: Numbers, measured: Numbers, peak: float | None = None) -> float:
    """Peak signal to noise ratio of two arrays of one shape, in dB: see `Comparison.psnr_db`. Pictures have the peak
    `PEAK`.
    """
    return Comparison().add(reference, measured).psnr_db(peak)


def cosine(reference: Numbers, measured: Numbers) -> float:
    """Cosine similarity of two arrays of one shape, -1 to 1: see `Comparison.cosine`."""
    return Comparison().add(reference, measured).cosine


def ssim(reference: Picture, measured: Picture) -> float:
    """Structural similarity of two pictures, uint8 RGB [height, width, 3], -1 to 1; 1 is no difference.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", with their Gaussian
    window of 11 pixels (sigma 1.5), mean over pixels and the three channels; computed by scikit-image. Raises
    InvalidInput when a picture is smaller than the window or of another size than the other, MissingDependency without
    scikit-image.
    """
    _check_pictures(reference, measured)
    found = require("skimage.metrics", "export").structural_similarity(
        reference,
        measured,
        data_range=PEAK,
        channel_axis=2,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
    )
    return float(found)


def gmsd(reference: Picture, measured: Picture) -> float:
    """Gradient magnitude similarity deviation of two pictures, uint8 RGB [height, width, 3]: 0 is no difference, more
    is worse.

    Xue et al. 2014, "Gradient magnitude similarity deviation" (arXiv 1308.3052): how unevenly the edges of two
    pictures, by Prewitt's operator on luminance at half the size, resemble each other. A perceptual distance without
    trained weights. The outermost pixels, where edges would need pixels beyond, are left out. Raises InvalidInput when
    a picture is smaller than `SSIM_EDGE` or of another size.
    """
    _check_pictures(reference, measured)
    one, other = (_gradients(picture) for picture in (reference, measured))
    similarity = (2 * one * other + GRADIENT_FLOOR) / (one**2 + other**2 + GRADIENT_FLOOR)
    return float(similarity.std())


def _gradients(picture: Picture) -> NDArray[np.float64]:
    """Magnitudes of Prewitt's gradients of the luminance at half the size, without its border."""
    luminance = np.asarray(picture, np.float64) @ np.array(LUMA)
    height, width = (length // 2 * 2 for length in luminance.shape)
    half = luminance[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    rows = (half[:, :-2] + half[:, 1:-1] + half[:, 2:]) / 3
    columns = (half[:-2] + half[1:-1] + half[2:]) / 3
    return np.asarray(np.hypot(rows[:-2] - rows[2:], columns[:, :-2] - columns[:, 2:]))


def _check_pictures(reference: Picture, measured: Picture) -> None:
    check_picture(reference, "reference")
    check_picture(measured, "measured")
    if reference.shape != measured.shape or min(reference.shape[:2]) < SSIM_EDGE:
        shapes = f"{list(reference.shape)} and {list(measured.shape)}"
        raise InvalidInput(
            "measured", f"the pictures are {shapes}, expected one size of at least {SSIM_EDGE} pixels an edge"
        )


def kl_divergence(reference: Logits, measured: Logits) -> float:
    """Mean over positions of the Kullback-Leibler divergence sum p (log p - log q) in nats, 0 or more; 0 is no
    difference.

    p and q are the next-token distributions (softmax) of `reference` and `measured`, logits [positions, vocab] with one
    position at least. Kullback and Leibler 1951. Raises InvalidInput when shapes differ or a logit is not finite.
    """
    _check_logits(reference, "reference")
    _check_logits(measured, "measured")
    if reference.shape != measured.shape:
        raise InvalidInput(
            "measured", f"has shape {list(measured.shape)}, expected {list(reference.shape)} as the reference"
        )
    log_p, log_q = log_softmax(reference), log_softmax(measured)
    return max(float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()), 0.0)


def perplexity(logits: Logits, tokens: Sequence[int]) -> float:
    """How unexpected tokens are: exp(-mean log p(token)), 1 or more, at most `CAP_PERPLEXITY`.

    `logits` [positions, vocab] hold the distribution in front of each of `tokens` [positions]. Jelinek et al. 1977.
    Raises InvalidInput when there are no positions, counts differ, a logit is not finite or a token is outside the
    vocabulary.
    """
    _check_logits(logits, "logits")
    if len(tokens) != len(logits) or not all(0 <= token < logits.shape[1] for token in tokens):
        raise InvalidInput(
            "tokens", f"are {len(tokens)}, expected {len(logits)} below {logits.shape[1]}, one for each position"
        )
    surprise = -log_softmax(logits)[np.arange(len(tokens)), list(tokens)].mean()
    return math.exp(min(max(float(surprise), 0.0), math.log(CAP_PERPLEXITY)))


def token_agreement(reference: Sequence[int], measured: Sequence[int]) -> float:
    """Share of places at which two token sequences have the same token, 0 to 1, of the longer one's places; 1 when both
    are empty.
    """
    places = max(len(reference), len(measured))
    return sum(r == m for r, m in zip(reference, measured, strict=False)) / places if places else 1.0


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Logarithms of the probabilities [positions, vocab] of finite logits [positions, vocab], float64."""
    shifted = np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _check_logits(logits: Logits, field: str) -> None:
    if logits.ndim != 2 or not logits.size:
        raise InvalidInput(
            field, f"has shape {list(logits.shape)}, expected [positions, vocab] with at least one of each"
        )
    if not np.isfinite(logits).all():
        raise InvalidInput(field, "holds NaN or infinity, expected finite logits")
