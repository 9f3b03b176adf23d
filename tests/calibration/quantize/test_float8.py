"""E4M3: numbers as the standard has them, plans that use them where both sides are quantized, graphs that say what they
compute.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from calibration.observe.lean import lean_session
from calibration.observe.ranges import Range
from calibration.quantize.equalize import Fold, equalize
from calibration.quantize.float8 import FP8, FP8_PEAK, Float8Weight, fp8_columns
from calibration.quantize.plan import activation_tensors, plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import RECIPES, recipe
from export.graph.weights import precision, write
from runtime.errors import SourceError
from runtime.targets.lowering.half import to_half

FLOAT, FLOAT8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
INPUTS, OUTPUTS = 96, 128


def two_layers(outlier: float = 1.0) -> ir.Model:
    """x -> norm -> MatMul -> MatMul, stored as float16; one channel of the norm is larger by `outlier`, its weights
    smaller.
    """
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", INPUTS]))
    scale = np.ones(INPUTS, np.float32)
    scale[3] = outlier
    arrays = {
        "norm.weight": scale,
        "norm.bias": np.zeros(INPUTS, np.float32),
        "first.weight": rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float16) / np.float16(10),
        "second.weight": rng.standard_normal((OUTPUTS, INPUTS)).astype(np.float16) / np.float16(10),
    }
    arrays["first.weight"][3] /= np.float16(outlier)
    values = {
        name: ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        for name, array in arrays.items()
        for tensor in [ir.tensor(array, name=name)]
    }
    norm = ir.node("LayerNormalization", [x, values["norm.weight"], values["norm.bias"]], name="norm")
    nodes, read = [norm], norm.outputs[0]
    read.name = "norm.out"
    for name in ("first", "second"):
        cast = ir.node("Cast", [values[f"{name}.weight"]], {"to": FLOAT}, name=f"{name}/Cast")
        cast.outputs[0].name = f"{name}.weight.float"
        layer = ir.node("MatMul", [read, cast.outputs[0]], name=name)
        nodes += [cast, layer]
        read = layer.outputs[0]
        read.name = f"{name}.out"
    for node in nodes:
        node.outputs[0].type = ir.TensorType(FLOAT)
    read.shape = ir.Shape(["batch", INPUTS])
    graph = ir.Graph([x], [read], nodes=nodes, initializers=values.values(), opset_imports={"": 23}, name="two")
    return ir.Model(graph, ir_version=10)


def samples() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((16, INPUTS)).astype(np.float32)


def run(model: ir.Model) -> NDArray[np.float32]:
    session: Any = lean_session(model)
    return np.asarray(session.run(None, {"x": samples()})[0])


def ranges(model: ir.Model) -> dict[str, Range]:
    """The largest magnitudes of what is quantized, for 16 rows."""
    watched = model.clone()
    values = ir.convenience.create_value_mapping(watched.graph)
    names = activation_tensors(model, RECIPES["fp8"])
    watched.graph.outputs[:] = [values[name] for name in names]
    session: Any = lean_session(watched)
    found = session.run(None, {"x": samples()})
    return {name: Range(float(np.abs(array).max()), 40.0) for name, array in zip(names, found, strict=True)}


def snr_db(values: NDArray[Any], reference: NDArray[Any]) -> float:
    exact = reference.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / max(np.sum((values - exact) ** 2), 1e-30)))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.integers(1, 70), st.integers(1, 9))
def test_errors_are_bounded(seed: int, magnitude: float, rows: int, columns: int) -> None:
    """Half a unit of the last of four digits, or half a step below the smallest normal number, 2^-6."""
    weights = (np.random.default_rng(seed).standard_t(3, (rows, columns)) * magnitude).astype(np.float32)
    codes, scales = fp8_columns(weights)
    assert codes.dtype == FP8 and np.isfinite(codes.astype(np.float32)).all()
    error = np.abs(codes.astype(np.float64) * scales - weights)
    assert np.all(error <= np.maximum(np.abs(weights) / 16, scales * 2.0**-10) * 1.0001)
    assert np.all(np.abs(codes.astype(np.float32)).max(axis=0) == FP8_PEAK)


def test_zero_columns_have_a_scale() -> None:
    codes, scales = fp8_columns(np.zeros((4, 2), np.float32))
    assert not codes.astype(np.float32).any() and scales.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_stored_precisions_and_orders_agree(dtype: type) -> None:
    stored = np.random.default_rng(0).standard_normal((70, 192)).astype(dtype)
    one = Float8Weight(ir.tensor(stored, name="w"), transposed=True)
    other = Float8Weight(ir.tensor(np.ascontiguousarray(stored.T), name="w"), transposed=False)
    assert one.codes().tobytes() == other.codes().tobytes()
    assert one.scales().tobytes() == other.scales().tobytes()
    np.testing.assert_array_equal(one.kernel().numpy(), other.codes().numpy().T)
    assert one.scales().shape == (70,)


def test_plans_use_fp8_where_both_sides_are_quantized() -> None:
    model = two_layers()
    assert [(layer.weight_type, layer.activation) for layer in plan(model, RECIPES["fp8"], ranges(model))] == [
        ("fp8", True)
    ] * 2
    noisy = ranges(model) | {"norm.out": Range(1.0, 20.0)}
    first, second = plan(model, RECIPES["fp8"], noisy)
    assert (first.weight_type, first.activation) == ("int8", False) and "20.0 dB" in first.reason
    assert (second.weight_type, second.activation) == ("fp8", True)


def test_the_graph_is_standard_and_near(tmp_path: Path) -> None:
    model = two_layers()
    copy = quantize(model, plan(model, RECIPES["fp8"], ranges(model)), ranges(model))
    write(copy, tmp_path / "out")
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    assert precision(copy).weights[0] == "fp8" and precision(copy).activations == "fp8"
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"))
    reference = np.asarray(ReferenceEvaluator(proto).run(None, {"x": samples()})[0])
    ours = run(ir.load(tmp_path / "out" / "model.onnx"))
    print(
        f"against float {snr_db(ours, run(model)):.1f} dB, reference evaluator and ONNX Runtime apart "
        f"{snr_db(ours, reference):.1f} dB"
    )
    assert snr_db(ours, reference) > 60
    assert 25 < snr_db(ours, run(model)) < 40


def test_outliers_cost_less_than_in_int8() -> None:
    """A channel sixty times as large takes int8 its steps, not E4M3 its digits."""
    model = two_layers(outlier=60.0)
    seen = ranges(model)
    figures = [
        snr_db(run(quantize(model, plan(model, RECIPES[name], seen), seen)), run(model)) for name in ("int8", "fp8")
    ]
    print("int8 {:.1f} dB, fp8 {:.1f} dB".format(*figures))
    assert figures[1] > figures[0] + 10


def test_folds_stay_usable() -> None:
    model = two_layers(outlier=60.0)
    scales = np.ones(INPUTS, np.float32)
    scales[3] = 60.0
    folded = equalize(
        model, [Fold("norm.out", "smoothquant", ("first.weight",), ("norm.weight", "norm.bias"), scales=scales)]
    )
    assert snr_db(run(folded), run(model)) > 100
    copy = quantize(folded, plan(folded, RECIPES["fp8"], ranges(folded)), ranges(folded))
    assert snr_db(run(copy), run(model)) > 25


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_fp8_in_half(half: Any) -> None:
    """QuantizeLinear and DequantizeLinear in half, as targets with such units read them."""
    model = two_layers()
    lowered = to_half(quantize(model, plan(model, RECIPES["fp8"], ranges(model)), ranges(model)), half)
    onnx.shape_inference.infer_shapes(ir.to_proto(lowered), check_type=True, strict_mode=True)
    kinds = [
        (node.op_type, node.outputs[0].dtype)
        for node in lowered.graph
        if "Quantize" in node.op_type or "Dequantize" in node.op_type
    ]
    dtype = ir.DataType[half.upper()]
    assert sorted(kinds) == sorted(
        [("QuantizeLinear", FLOAT8), ("DequantizeLinear", dtype), ("DequantizeLinear", dtype)] * 2
    )


def test_a_tensor_may_be_read_in_both() -> None:
    model = two_layers()
    first, second = plan(model, RECIPES["fp8"], ranges(model))
    copy = quantize(model, [replace(first, weight_type="int8"), second], ranges(model))
    assert [node.outputs[0].dtype for node in copy.graph if node.op_type == "QuantizeLinear"] == [
        ir.DataType.INT8,
        FLOAT8,
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weights = np.ones((8, 8), np.float32)
    weights[1, 2] = bad
    with pytest.raises(SourceError, match="'w' holds NaN"):
        Float8Weight(ir.tensor(weights, name="w"), transposed=False).codes()


def test_recipes_say_what_they_need() -> None:
    assert RECIPES["fp8"].precisions == {"fp8", "int8"}
    assert RECIPES["int8"].precisions == {"int8"} and RECIPES["int4"].precisions == {"int4", "int8"}
    assert recipe("fp8", activations=False) == RECIPES["int8-weight"]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_quantizes_nothing(name: str) -> None:
    found = recipe(name, activations=False, least_bits=8)
    assert found == RECIPES[name] and found.half in ("float16", "bfloat16") and not found.precisions
    assert [(layer.weight_type, layer.activation, layer.reason) for layer in plan(two_layers(), found)] == [
        ("float", False, "")
    ] * 2
    assert activation_tensors(two_layers(), found) == []
