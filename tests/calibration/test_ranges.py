"""Ranges: right for known distributions, the same each time, in bounded groups."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibration.ranges
from calibration.ranges import Histogram, collect_ranges
from runtime.errors import InvalidInput


def seen(*arrays: NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def measured_snr(values: NDArray[np.float32], peak: float) -> float:
    step = peak / 127
    error = values - step * np.clip(np.rint(values / step), -127, 127)
    return float(10 * np.log10(np.sum(values**2) / np.sum(error**2)))


def test_predicted_ratio_is_the_measured_one() -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    found = seen(values).range()
    assert found.snr_db == pytest.approx(measured_snr(values, found.peak), abs=0.2)
    assert found.snr_db >= measured_snr(values, float(np.abs(values).max())) - 0.1


def test_outliers_are_clipped_where_that_is_better() -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    values[0] = 12
    found = seen(values).range()
    assert found.peak < 9
    assert measured_snr(values, found.peak) > measured_snr(values, 12) + 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1e20), st.integers(2, 6))
def test_growing_equals_seeing_the_largest_first(seed: int, scale: float, parts: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [(rng.standard_normal(500) * scale * 3.0**i).astype(np.float32) for i in range(parts)]
    forward, backward = seen(*arrays), seen(*reversed(arrays))
    assert forward.top == backward.top
    assert np.abs(np.cumsum(forward.counts) - np.cumsum(backward.counts)).max() <= 1  # rounding may move a value across an edge
    assert forward.range() == pytest.approx(backward.range(), rel=1e-2)


def test_zeros_constants_and_empty_tensors() -> None:
    assert seen(np.zeros((2, 3), np.float32)).range() == (0.0, math.inf)
    assert seen(np.zeros(0, np.float32)).range() == (0.0, math.inf)
    assert seen(np.full(100, -2.5, np.float32)).range().snr_db > 50


def graph(folder: Path) -> Path:
    """y = x * 3, z = log(y)."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 8]))
    three = ir.Value(
        name="three", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]), const_value=ir.tensor(np.float32(3), name="three")
    )
    y = ir.node("Mul", [x, three], name="mul")
    z = ir.node("Log", [y.outputs[0]], name="log")
    for node, name in ((y, "y"), (z, "z")):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, ir.Shape(["n", 8])
    model = ir.Model(ir.Graph([x], [z.outputs[0]], nodes=[y, z], initializers=[three], opset_imports={"": 23}, name="g"), ir_version=10)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def samples() -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(0.5, 2, (n, 8)).astype(np.float32)} for n in (3, 7)]


def test_inputs_and_inner_tensors_are_measured_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collect_ranges(graph(tmp_path), ["x", "y", "z"], samples())
    assert found["y"].peak == pytest.approx(3 * found["x"].peak, rel=1e-2)
    assert 5 < found["y"].peak <= 6
    assert collect_ranges(graph(tmp_path), ["x", "y", "z"], samples()) == found
    monkeypatch.setattr(calibration.ranges, "GROUP_BYTES", 1)
    assert collect_ranges(graph(tmp_path), ["x", "y", "z"], samples()) == found


def test_refusals_name_the_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no tensor other"):
        collect_ranges(graph(tmp_path), ["other"], samples())
    with pytest.raises(InvalidInput, match="at least one captured input"):
        collect_ranges(graph(tmp_path), ["y"], [])
    with pytest.raises(InvalidInput, match=r"'z' .* holds NaN or infinity"):
        collect_ranges(graph(tmp_path), ["y", "z"], [{"x": np.zeros((1, 8), np.float32)}])
    assert collect_ranges(graph(tmp_path), [], []) == {}
