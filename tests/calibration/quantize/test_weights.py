"""Numbers of quantized weights: with data, the error that matters is the smaller one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.quantize.weights import Int4, QuantizedWeight, int4_blocks, pack_int4

Floats = NDArray[np.float32]


def weighted_error(weights: Floats, importance: Floats, block: int, given: bool) -> float:
    """The output error to expect of uncorrelated inputs, when the scales are chosen with or without their
    importance.
    """
    codes, scales = int4_blocks(weights, block, importance if given else None)
    restored = codes * np.repeat(scales.astype(np.float32), block, axis=0)
    return float((importance[:, None].astype(np.float64) * np.square(restored - weights)).sum())


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]), st.floats(0, 6), st.integers(1, 4), st.integers(1, 9)
)
def test_importance_never_raises_the_weighted_error(
    seed: int, magnitude: float, spread: float, blocks: int, columns: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(3, (32 * blocks, columns)) * magnitude).astype(np.float32)
    importance = np.exp(rng.standard_normal(32 * blocks) * spread).astype(np.float32)
    assert weighted_error(weights, importance, 32, True) <= weighted_error(weights, importance, 32, False) * 1.0001


def test_importance_lowers_the_output_error() -> None:
    """Inputs of very unequal size, as after a norm with outlier channels: measured on the product itself."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((512, 128)).astype(np.float32)
    sizes = np.exp(rng.standard_normal(512) * 1.5).astype(np.float32)
    inputs = (rng.standard_normal((256, 512)) * sizes).astype(np.float32)
    ratios = []
    for importance in (None, np.square(inputs).mean(axis=0)):
        codes, scales = int4_blocks(weights, 64, importance)
        error = inputs @ (codes * np.repeat(scales.astype(np.float32), 64, axis=0) - weights)
        ratios.append(10 * np.log10(np.square(inputs @ weights).sum() / np.square(error).sum()))
    print("int4 output: {:.2f} dB by the weights alone, {:.2f} dB by their importance".format(*ratios))
    assert ratios[1] > ratios[0] + 1


@pytest.mark.parametrize(
    "importance", [np.zeros(64), np.full(64, 1e-30), np.full(64, 1e30), np.r_[np.ones(32), np.zeros(32)]]
)
def test_inputs_never_or_always_seen(importance: NDArray[np.float64]) -> None:
    """Unused blocks still restore their weights, and a uniform importance of any size is none."""
    weights = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    codes, scales = int4_blocks(weights, 32, importance.astype(np.float32))
    assert np.all(scales > 0)
    error = np.abs(codes * np.repeat(scales.astype(np.float32), 32, axis=0) - weights)
    assert np.square(error).sum() <= np.square(weights).sum() * 0.02


def test_importance_reaches_every_chunk() -> None:
    """A weight of several chunks, in both stored orders, equals its columns quantized at once."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4096, 160)).astype(np.float32)
    importance = np.exp(rng.standard_normal(4096)).astype(np.float32)
    _, scales = int4_blocks(weights, 64, importance)
    for stored, transposed in ((weights, False), (np.ascontiguousarray(weights.T), True)):
        weight = QuantizedWeight(ir.tensor(stored, name="w"), transposed, 64, importance)
        np.testing.assert_array_equal(weight.scales().numpy(), scales)


def test_what_was_computed_before_is_taken_as_it_is() -> None:
    """Codes and scales come from where they are known, and int8 has none."""
    weights = ir.tensor(np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32), name="w")
    codes, scales = np.arange(256, dtype=np.uint8).reshape(64, 4), np.full((2, 8), 0.25, np.float16)
    known = QuantizedWeight(weights, False, 32, known=lambda: Int4(codes, scales))
    levels = known.codes().numpy().astype(np.int8)
    np.testing.assert_array_equal(pack_int4(np.ascontiguousarray(levels)), codes)
    np.testing.assert_array_equal(known.scales().numpy(), scales)
    plain = QuantizedWeight(weights, False)
    np.testing.assert_array_equal(
        QuantizedWeight(weights, False, known=lambda: Int4(codes, scales)).codes().numpy(), plain.codes().numpy()
    )
