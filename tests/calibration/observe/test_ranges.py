"""Ranges and channel statistics: right for known distributions, the same each time, little kept of large tensors."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibration.observe.ranges
from calibration.observe.ranges import METHODS, PERCENTILE, ROWS, Histogram, Range, collect_ranges, observe
from runtime.errors import InvalidInput
from runtime.targets.lowering.activation_ranges import affine


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


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1e20), st.integers(2, 6))
def test_growing_equals_seeing_the_largest_first(seed: int, scale: float, parts: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [(rng.standard_normal(500) * scale * 3.0**i).astype(np.float32) for i in range(parts)]
    forward, backward = seen(*arrays), seen(*reversed(arrays))
    assert forward.top == backward.top
    assert (
        np.abs(np.cumsum(forward.counts) - np.cumsum(backward.counts)).max() <= 1
    )  # rounding may move a value across an edge
    assert forward.range("mse")[:2] == pytest.approx(backward.range("mse")[:2], rel=1e-2)


def test_zeros_constants_and_empty_tensors() -> None:
    assert seen(np.zeros((2, 3), np.float32)).range() == Range(0.0, math.inf, "minmax")
    assert seen(np.zeros(0, np.float32)).range() == Range(0.0, math.inf, "minmax")
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


def span_snr(values: NDArray[np.float32], found: Range) -> float:
    step, zero = affine(found.low, found.high)
    error = values - step * (np.clip(np.rint(values / step) + zero, 0, 255) - zero)
    return float(10 * np.log10(np.sum(values**2) / np.sum(error**2)))


def test_a_zero_point_for_what_lies_on_one_side() -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(300_000).astype(np.float32)
    silu = normal / (1 + np.exp(-normal))
    for values, gain in ((silu, 4.5), (-silu, 4.5), (np.abs(normal), 5.0)):
        histogram = seen(values)
        found = histogram.spanned(histogram.range())
        assert found.low <= 0 <= found.high
        assert span_snr(values, found) > measured_snr(values, found.peak) + gain
    for values in (normal, np.zeros(4, np.float32), rng.integers(-127, 128, 1000).astype(np.float32)):
        histogram = seen(values)
        assert histogram.spanned(histogram.range())[3:] == (0, 0), "a zero point gains nothing here"
    constant = seen(np.full(100, -2.5, np.float32))
    assert constant.spanned(constant.range()).high <= 0


@settings(max_examples=50)
@given(st.floats(-1e30, 0), st.floats(0, 1e30))
def test_activation_ranges_have_a_code_for_zero(low: float, high: float) -> None:
    assume(high - low > 1e-30)
    found = affine(low, high)
    assert 0 <= found.zero <= 255 and found.low <= 0 <= found.high
    assert abs(found.low - low) <= found.step and abs(found.high - high) <= found.step


def test_one_sided_inputs_of_observed_graphs() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal((1, 999, 3))).astype(np.float32)
    for scales in ({}, {"x": np.array([1, 2, 4], np.float32)}):
        found = observe(channelled(3), ["x", "y"], ["x"], [{"x": values}]).ranges(["x", "y"], scales=scales)
        assert found["x"].low == 0 < found["x"].high and found["y"].low < 0 == found["y"].high
        assert found["x"].high <= (values / scales.get("x", np.float32(1))).max() * 1.01


def test_ranges_survive_json() -> None:
    for found in (Range(1.0, 40.0), Range(2.0, 30.0, "percentile"), seen(np.zeros(3, np.float32)).range()):
        assert Range(*json.loads(json.dumps(list(found)))) == found
    assert Range(*[1.0, 40.0]).method == "mse", "what was kept before methods had names"


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_channels_are_summed_over_calls(seed: int, calls: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, int(rng.integers(1, 90)), width)).astype(np.float32) for _ in range(calls)]
    found = observe(channelled(width), (), ["x"], [{"x": array} for array in arrays]).stats["x"]
    together = np.concatenate([array.reshape(-1, width) for array in arrays])
    np.testing.assert_array_equal(found.largest, np.abs(together).max(axis=0))
    np.testing.assert_allclose(found.mean_magnitude, np.abs(together).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.mean_square, np.square(together).mean(axis=0), rtol=1e-5)
    assert found.count == len(together) and len(found.parts) == (2 if calls > 1 else 0)
    assert 1 <= len(found.rows) <= ROWS + 2 * calls
    assert {row.tobytes() for row in found.rows} <= {row.tobytes() for row in together}
    halved = found.divided(np.full(width, 2, np.float32))
    np.testing.assert_allclose(halved.mean_square, found.mean_square / 4)


def channelled(width: int) -> ir.Model:
    """x [batch, rows, width] and nothing but its negation."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "rows", width]))
    node = ir.node("Neg", [x], name="neg")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, x.shape
    return ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}, name="g"), ir_version=10)


def test_constant_zero_and_huge_channels() -> None:
    stats = observe(channelled(3), (), ["x"], [{"x": np.array([[[0, -2.5, 1e30]] * 3], np.float32)}]).stats["x"]
    assert stats.largest.tolist() == [0, 2.5, np.float32(1e30)]
    assert stats.mean_magnitude.tolist() == [0, 2.5, pytest.approx(1e30)]
    assert stats.mean_square.tolist() == [0, 6.25, np.finfo(np.float32).max]
    zero = observe(channelled(3), ["x"], ["x"], [{"x": np.zeros((1, 4, 3), np.float32)}])
    assert zero.ranges(["x"])["x"] == Range(0.0, math.inf, "minmax") and not zero.stats["x"].largest.any()
    for bad in (np.nan, np.inf, -np.inf):
        for names in ((["x"], ()), ((), ["x"])):
            with pytest.raises(InvalidInput, match=r"'x' of g holds NaN or infinity"):
                observe(channelled(3), *names, [{"x": np.array([[[0, bad, 0]]], np.float32)}])


def test_large_tensors_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out changes the range by little, and the largest magnitude is never missed."""
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((2, 300, 64)).astype(np.float32)} for _ in range(4)]
    samples[2]["x"][1, 17, 5] = 9
    whole = observe(channelled(64), ["x", "y"], ["x"], samples)
    monkeypatch.setattr(calibration.observe.ranges, "VALUES", 64 * 128)
    some = observe(channelled(64), ["x", "y"], ["x"], samples)
    for name in ("x", "y"):
        assert some.ranges([name], "minmax")[name].peak == 9
        one, other = whole.ranges([name])[name], some.ranges([name])[name]
        print(f"{name}: peak {one.peak:.2f} and {other.peak:.2f}, {one.snr_db:.1f} and {other.snr_db:.1f} dB")
        assert one.peak == pytest.approx(other.peak, rel=0.1) and one.snr_db == pytest.approx(other.snr_db, abs=0.5)
    assert whole.stats["x"].largest.tobytes() == some.stats["x"].largest.tobytes()


def graph() -> ir.Model:
    """y = x * 3, z = log(y)."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 8]))
    three = ir.Value(
        name="three",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([]),
        const_value=ir.tensor(np.float32(3), name="three"),
    )
    y = ir.node("Mul", [x, three], name="mul")
    z = ir.node("Log", [y.outputs[0]], name="log")
    for node, name in ((y, "y"), (z, "z")):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, ir.Shape(["n", 8])
    return ir.Model(
        ir.Graph([x], [z.outputs[0]], nodes=[y, z], initializers=[three], opset_imports={"": 23}, name="g"),
        ir_version=10,
    )


def samples() -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(0.5, 2, (n, 8)).astype(np.float32)} for n in (3, 7)]


def test_inputs_and_inner_tensors_are_measured_the_same_each_time() -> None:
    model = graph()
    found = collect_ranges(model, ["x", "y", "z"], samples())
    assert found["y"].peak == pytest.approx(3 * found["x"].peak, rel=1e-2)
    assert 5 < found["y"].peak <= 6
    assert collect_ranges(model, ["x", "y", "z"], samples()) == found
    assert [value.name for value in model.graph.outputs] == ["z"], "the source graph was changed"


def test_ranges_and_channels_of_the_same_runs() -> None:
    seen = observe(graph(), ["y"], ["x"], samples())
    assert seen.ranges(["y"]) == collect_ranges(graph(), ["y"], samples())
    other = observe(graph(), ["z"], ["x", "y"], samples()).stats
    np.testing.assert_allclose(other["y"].mean_square, 9 * other["x"].mean_square, rtol=1e-6)
    assert seen.stats["x"].rows.tobytes() == other["x"].rows.tobytes()


def test_ranges_of_scaled_channels() -> None:
    """y / 3 has the range of x."""
    found = collect_ranges(graph(), ["x", "y"], samples(), scales={"y": np.full(8, 3, np.float32)})
    assert found["y"] == pytest.approx(found["x"])
    naive = collect_ranges(graph(), ["y"], samples(), "minmax")["y"]
    assert naive.peak == max(sample["x"].max() for sample in samples()) * np.float32(3) and naive.method == "minmax"


def test_refusals_name_the_fault() -> None:
    with pytest.raises(InvalidInput, match="no tensor other"):
        collect_ranges(graph(), ["other"], samples())
    with pytest.raises(InvalidInput, match="at least one captured input"):
        collect_ranges(graph(), ["y"], [])
    with pytest.raises(InvalidInput, match=r"'z' .* holds NaN or infinity"):
        collect_ranges(graph(), ["y", "z"], [{"x": np.zeros((1, 8), np.float32)}])
    with pytest.raises(InvalidInput, match="did you mean 'minmax'"):
        collect_ranges(graph(), ["y"], samples(), "min-max")  # type: ignore[arg-type]
    assert collect_ranges(graph(), [], []) == {}
