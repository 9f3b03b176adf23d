"""Ranges and channel statistics: right for known distributions, the same each time, in bounded groups."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibration.ranges
from calibration.ranges import METHODS, PERCENTILE, ROWS, Channels, Histogram, Range, collect, collect_ranges, collect_stats
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
    assert forward.range("mse")[:2] == pytest.approx(backward.range("mse")[:2], rel=1e-2)


def test_zeros_constants_and_empty_tensors() -> None:
    assert seen(np.zeros((2, 3), np.float32)).range() == (0.0, math.inf, "minmax")
    assert seen(np.zeros(0, np.float32)).range() == (0.0, math.inf, "minmax")
    assert seen(np.full(100, -2.5, np.float32)).range().snr_db > 50


def test_the_method_of_least_error_wins() -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(1_000_000).astype(np.float32)
    normal[0] = 30
    histogram = seen(normal)
    by_method = {method: histogram.range(method) for method in METHODS}
    print({method: f"peak {found.peak:.2f}, {found.snr_db:.1f} dB" for method, found in by_method.items()})
    assert [found.method for found in by_method.values()] == list(METHODS)
    assert by_method["minmax"].peak == 30
    assert by_method["percentile"].peak == pytest.approx(np.quantile(np.abs(normal), PERCENTILE / 100), abs=0.01)
    best = histogram.range()
    assert best == max(by_method.values(), key=lambda found: found.snr_db)
    assert best.snr_db > by_method["minmax"].snr_db + 3
    assert seen(rng.integers(-127, 128, 1000).astype(np.float32)).range().snr_db > 50
    assert seen(np.array([-127.0, 127], np.float32)).range().method == "minmax", "of equals the simplest"


def test_ranges_survive_json() -> None:
    for found in (Range(1.0, 40.0), Range(2.0, 30.0, "percentile"), seen(np.zeros(3, np.float32)).range()):
        assert Range(*json.loads(json.dumps(list(found)))) == found
    assert Range(*[1.0, 40.0]).method == "mse", "what was kept before methods had names"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_channels_are_summed_over_calls(seed: int, calls: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, int(rng.integers(1, 90)), width)).astype(np.float32) for _ in range(calls)]
    channels = Channels(math.ceil(ROWS / calls))
    for array in arrays:
        channels.add(array)
    found, together = channels.stats(), np.concatenate([array.reshape(-1, width) for array in arrays])
    np.testing.assert_array_equal(found.largest, np.abs(together).max(axis=0))
    np.testing.assert_allclose(found.mean_magnitude, np.abs(together).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.mean_square, np.square(together).mean(axis=0), rtol=1e-5)
    assert 1 <= len(found.rows) <= ROWS + calls
    assert {row.tobytes() for row in found.rows} <= {row.tobytes() for row in together}
    halved = found.divided(np.full(width, 2, np.float32))
    np.testing.assert_allclose(halved.mean_square, found.mean_square / 4)


def test_constant_zero_and_huge_channels() -> None:
    channels = Channels(4)
    channels.add(np.array([[0, -2.5, 1e30]] * 3, np.float32))
    found = channels.stats()
    assert found.largest.tolist() == [0, 2.5, np.float32(1e30)]
    assert found.mean_magnitude.tolist() == [0, 2.5, np.float32(1e30)]
    assert found.mean_square.tolist() == [0, 6.25, np.finfo(np.float32).max]
    empty = Channels(4)
    empty.add(np.zeros((0, 3), np.float32))
    assert empty.stats().largest.tolist() == [0, 0, 0] and empty.stats().rows.shape == (0, 3)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            channels.add(np.array([[0, bad, 0]], np.float32))


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


def test_ranges_and_channels_of_the_same_runs(tmp_path: Path) -> None:
    ranges, stats = collect(graph(tmp_path), ["y"], ["x", "y"], samples())
    assert list(ranges) == ["y"] and list(stats) == ["x", "y"]
    assert ranges == collect_ranges(graph(tmp_path), ["y"], samples())
    np.testing.assert_allclose(stats["y"].mean_square, 9 * stats["x"].mean_square, rtol=1e-6)
    assert collect_stats(graph(tmp_path), ["x"], samples())["x"].rows.tobytes() == stats["x"].rows.tobytes()


def test_ranges_of_scaled_channels(tmp_path: Path) -> None:
    """y / 3 has the range of x."""
    found = collect_ranges(graph(tmp_path), ["x", "y"], samples(), scales={"y": np.full(8, 3, np.float32)})
    assert found["y"] == pytest.approx(found["x"])
    naive = collect_ranges(graph(tmp_path), ["y"], samples(), "minmax")["y"]
    assert naive.peak == max(sample["x"].max() for sample in samples()) * np.float32(3) and naive.method == "minmax"


def test_refusals_name_the_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no tensor other"):
        collect_ranges(graph(tmp_path), ["other"], samples())
    with pytest.raises(InvalidInput, match="at least one captured input"):
        collect_ranges(graph(tmp_path), ["y"], [])
    with pytest.raises(InvalidInput, match=r"'z' .* holds NaN or infinity"):
        collect_ranges(graph(tmp_path), ["y", "z"], [{"x": np.zeros((1, 8), np.float32)}])
    with pytest.raises(InvalidInput, match=r"'y' .* holds NaN or infinity"):
        collect_stats(graph(tmp_path), ["y"], [{"x": np.full((1, 8), np.inf, np.float32)}])
    with pytest.raises(InvalidInput, match="did you mean 'minmax'"):
        collect_ranges(graph(tmp_path), ["y"], samples(), "min-max")  # type: ignore[arg-type]
    assert collect_ranges(graph(tmp_path), [], []) == {}
