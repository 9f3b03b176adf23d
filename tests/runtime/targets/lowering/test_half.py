"""Lowered graphs: types as a strongly typed parser demands them, no cast too many, the function of the float graph."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError, InvalidInput
from runtime.targets.lowering.half import Half, rounding, to_half

FLOAT, FLOAT16, BFLOAT16, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8
HALVES: Sequence[Half] = ("float16", "bfloat16")


def initializer(name: str, values: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(values, dtype=dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)


def node(
    name: str, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType = FLOAT, **attributes: Any
) -> ir.Node:
    made = ir.node(op, inputs, attributes, name=name)
    made.outputs[0].name, made.outputs[0].dtype = f"{name}.out", dtype
    return made


def model(nodes: Sequence[ir.Node], constants: Sequence[ir.Value], width: int = 64) -> ir.Model:
    """A graph from x float32 [batch, width], which the first node reads first, to what the last node gives."""
    (x,) = {value for made in nodes for value in made.inputs if value is not None and value.name == "x"}
    x.type, x.shape = ir.TensorType(FLOAT), ir.Shape(["batch", width])
    output = nodes[-1].outputs[0]
    output.shape = ir.Shape(["batch", width])
    return ir.Model(
        ir.Graph([x], [output], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="toy"), ir_version=10
    )


def linear(weights: NDArray[Any], dtype: ir.DataType = FLOAT16) -> ir.Model:
    """A stored weight behind its Cast, a norm, and a sum with the input."""
    width = len(weights)
    x, w = ir.Value(name="x"), initializer("w", weights, dtype)
    ones, zeros = initializer("ones", np.ones(width, np.float32)), initializer("zeros", np.zeros(width, np.float32))
    cast = node("w/Cast", "Cast", [w], to=FLOAT)
    product = node("product", "MatMul", [x, cast.outputs[0]])
    norm = node("norm", "LayerNormalization", [product.outputs[0], ones, zeros])
    added = node("added", "Add", [norm.outputs[0], x])
    return model([cast, product, norm, added], [w, ones, zeros], width)


def weights(width: int = 64) -> NDArray[np.float16]:
    return (np.random.default_rng(0).standard_normal((width, width)) / np.sqrt(width)).astype(np.float16)


def run(graph: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def snr_db(values: NDArray[Any], reference: NDArray[Any]) -> float:
    exact = reference.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / max(np.sum((values - exact) ** 2), 1e-30)))


def check_types(lowered: ir.Model, half: Half) -> None:
    """What the standard's own checker and strict inference say, and what our values say of themselves."""
    whole = lowered.clone()
    for value in whole.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
    proto = ir.to_proto(whole)
    onnx.checker.check_model(proto)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for made in lowered.graph:
        assert all(
            output.dtype is None or types.get(str(output.name), output.dtype) == output.dtype for output in made.outputs
        ), made
        floats = {v.dtype for v in made.inputs if v is not None and v.dtype in (FLOAT, FLOAT16, BFLOAT16)}
        assert made.op_type in ("Cast", "Resize") or len(floats) <= 1, f"{made.name} reads {floats}"
        assert (BFLOAT16 if half == "float16" else FLOAT16) not in floats, f"{made.name} reads {floats}"


def check_casts(lowered: ir.Model) -> None:
    """No Cast of a constant, none that changes nothing, none of a Cast, and one for each value and type."""
    casts = [made for made in lowered.graph if made.op_type == "Cast"]
    for cast in casts:
        source = cast.inputs[0]
        assert source is not None and not source.is_initializer()
        assert source.dtype != cast.attributes["to"].as_int()
        maker = source.producer()
        assert maker is None or maker.op_type != "Cast" or maker.inputs[0].dtype not in (FLOAT, FLOAT16, BFLOAT16)  # type: ignore[union-attr]
    kinds = [
        (cast.inputs[0], cast.attributes["to"].as_int()) for cast in casts if not cast.outputs[0].is_graph_output()
    ]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("fixture", ["diffusion_bundle", "vlm_bundle"])
def test_samples_are_typed_throughout(fixture: str, half: Half, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(fixture)
    for submodel in Bundle(root).manifest.submodels:
        graph = ir.load(root / submodel.graph)
        lowered = to_half(graph, half)
        check_types(lowered, half)
        check_casts(lowered)
        for side in ("inputs", "outputs"):
            declared, left = getattr(graph.graph, side), getattr(lowered.graph, side)
            assert [(v.name, v.dtype) for v in declared] == [(v.name, v.dtype) for v in left]
        stored = {name: value.const_value for name, value in lowered.graph.initializers.items()}
        large = [
            t for t in stored.values() if t is not None and t.nbytes >= 4096 and t.dtype in (FLOAT, FLOAT16, BFLOAT16)
        ]
        assert all(tensor.dtype == ir.DataType[half.upper()] for tensor in large), submodel.name


@pytest.mark.parametrize("fixture", ["diffusion_bundle", "vlm_bundle"])
def test_samples_compute_the_same_in_float16(fixture: str, request: pytest.FixtureRequest) -> None:
    """On the CPU provider, which rounds less often than a device: `calibration.observe.half` emulates one."""
    root: Path = request.getfixturevalue(fixture)
    for submodel in Bundle(root).manifest.submodels:
        path = root / submodel.graph
        inputs = submodel.signature.sample(submodel.signature.sample_lengths())
        angles = [made.name for made in ir.load(path).graph if made.op_type in ("Sin", "Cos")]
        outputs = []
        for graph in (ir.load(path), to_half(ir.load(path), "float16"), to_half(ir.load(path), "float16", angles)):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            session = onnxruntime.InferenceSession(
                ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            outputs.append(session.run(None, inputs)[0])
        figures = [snr_db(values, outputs[0]) for values in outputs[1:]]
        print("{}: {:.1f} dB in float16, {:.1f} dB with sines kept".format(submodel.name, *figures))
        assert min(figures) > 40


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("stored", [FLOAT, FLOAT16, BFLOAT16])
def test_weights_are_read_in_half(half: Half, stored: ir.DataType) -> None:
    dtype = ir.DataType[half.upper()]
    lowered = to_half(linear(weights().astype(stored.numpy()), stored), half)
    check_types(lowered, half)
    check_casts(lowered)
    assert [made.op_type for made in lowered.graph] == ["Cast", "MatMul", "LayerNormalization", "Add", "Cast"]
    assert {value.dtype for value in lowered.graph.initializers.values()} == {dtype}
    values = {
        name: value.const_value.numpy()
        for name, value in lowered.graph.initializers.items()
        if value.const_value is not None
    }
    (matrix,) = [array for array in values.values() if array.ndim == 2]
    assert matrix.dtype == dtype.numpy()
    np.testing.assert_array_equal(matrix, weights().astype(stored.numpy()).astype(dtype.numpy()))


def test_the_source_is_not_changed() -> None:
    graph = linear(weights())
    before = ir.to_proto(graph).SerializeToString()
    to_half(graph, "float16")
    assert ir.to_proto(graph).SerializeToString() == before


@pytest.mark.parametrize("half", HALVES)
def test_lowering_twice_changes_nothing(half: Half) -> None:
    once = to_half(linear(weights()), half)
    twice = to_half(once, half)
    assert [(made.op_type, [v and v.dtype for v in made.inputs]) for made in twice.graph] == [
        (made.op_type, [v and v.dtype for v in made.inputs]) for made in once.graph
    ]
    assert sorted(twice.graph.initializers) == sorted(once.graph.initializers)


@pytest.mark.parametrize("half", HALVES)
def test_kept_nodes_are_float32_between_casts(half: Half) -> None:
    lowered = to_half(linear(weights()), half, ["norm"])
    check_types(lowered, half)
    check_casts(lowered)
    made = {found.name: found for found in lowered.graph}
    assert {value.dtype for value in made["norm"].inputs if value} == {FLOAT} == {made["norm"].outputs[0].dtype}
    assert made["product"].outputs[0].dtype == made["added"].outputs[0].dtype == ir.DataType[half.upper()]
    assert sum(found.op_type == "Cast" for found in lowered.graph) == 4  # x, into the norm, out of it, the output


def test_neighbours_that_are_kept_exchange_float32() -> None:
    lowered = to_half(linear(weights()), "float16", ["product", "norm", "added"])
    assert not any(found.op_type == "Cast" for found in lowered.graph)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(run(lowered, x), run(linear(weights()), x))


def overflowing() -> ir.Model:
    """x, times a thousand twice, and back: 1e6 on the way, in the middle of what half holds at both ends."""
    x, thousand, less = (
        ir.Value(name="x"),
        initializer("thousand", np.float32(1000)),
        initializer("less", np.float32(1e-6)),
    )
    first = node("first", "Mul", [x, thousand])
    second = node("second", "Mul", [first.outputs[0], thousand])
    back = node("back", "Mul", [second.outputs[0], less])
    return model([first, second, back], [thousand, less])


def test_a_huge_activation_overflows_unless_kept() -> None:
    x = np.random.default_rng(0).uniform(0.5, 1, (2, 64)).astype(np.float32)
    x[0, 0] = 1.0
    graphs = [overflowing(), *(to_half(overflowing(), "float16", keep) for keep in (["back"], ["second", "back"]))]
    with np.errstate(over="ignore"):
        outputs = [np.asarray(ReferenceEvaluator(ir.to_proto(graph)).run(None, {"x": x})[0]) for graph in graphs]
    assert np.isinf(outputs[1]).all(), "1e6 was expected not to fit"
    assert snr_db(outputs[2], outputs[0]) > 60
    assert outputs[0][0, 0] == pytest.approx(1.0)


def test_constants_that_half_cannot_express_keep_their_reader() -> None:
    """1e-6 has four digits less in float16, so its reader computes in float32 by itself; bfloat16 has them."""
    kept = {found.name: found for found in to_half(overflowing(), "float16").graph}
    assert kept["back"].outputs[0].dtype == FLOAT
    assert kept["second"].outputs[0].dtype == FLOAT16
    assert {found.name: found for found in to_half(overflowing(), "bfloat16").graph}["back"].outputs[
        0
    ].dtype == BFLOAT16


@pytest.mark.parametrize(("value", "fits"), [(1e-9, False), (1e-3, True), (0.0, True), (6e4, True), (7e4, False)])
def test_rounding_measures_what_is_lost(value: float, fits: bool) -> None:
    values = np.full((3, 5), value, np.float32)
    assert (rounding(values, np.float16) <= 2**-8) == fits
    assert rounding(values, ml_dtypes.bfloat16) <= 2**-8


@pytest.mark.parametrize("half", HALVES)
def test_quantized_weights_and_activations(half: Half) -> None:
    """int8 on both sides, int4 in blocks: the scales are in half, and what DequantizeLinear gives goes into the product
    as it is.
    """
    rng = np.random.default_rng(0)
    x, scale, zero = ir.Value(name="x"), initializer("x.scale", np.float32(0.02)), initializer("x.zero", np.int8(0))
    eight = initializer("eight", rng.integers(-127, 128, (64, 64)).astype(np.int8))
    four = initializer("four", rng.integers(-8, 8, (64, 64)).astype(ml_dtypes.int4))
    steps = initializer("eight.scale", rng.uniform(1e-3, 2e-3, 64).astype(np.float32))
    blocks = initializer("four.scale", rng.uniform(1e-2, 2e-2, (2, 64)).astype(np.float16))
    quantized = node("q", "QuantizeLinear", [x, scale, zero], INT8)
    restored = node("d", "DequantizeLinear", [quantized.outputs[0], scale, zero])
    first = node("first.weight", "DequantizeLinear", [eight, steps], axis=1)
    cast = node("cast", "Cast", [blocks], to=FLOAT)
    second = node("second.weight", "DequantizeLinear", [four, cast.outputs[0]], axis=0, block_size=32)
    one = node("one", "MatMul", [restored.outputs[0], first.outputs[0]])
    two = node("two", "MatMul", [one.outputs[0], second.outputs[0]])
    graph = model([quantized, restored, first, cast, second, one, two], [scale, zero, eight, four, steps, blocks])
    lowered = to_half(graph, half)
    check_types(lowered, half)
    check_casts(lowered)
    kinds = collections.Counter(found.op_type for found in lowered.graph)
    assert kinds == {"QuantizeLinear": 1, "DequantizeLinear": 3, "MatMul": 2, "Cast": 2}
    dtype = ir.DataType[half.upper()]
    assert all(found.outputs[0].dtype == dtype for found in lowered.graph if found.op_type == "DequantizeLinear")
    if half == "float16":
        values = rng.standard_normal((4, 64)).astype(np.float32)
        assert snr_db(run(lowered, values), run(graph, values)) > 40


def test_integers_and_comparisons_stay() -> None:
    x, threshold = ir.Value(name="x"), initializer("threshold", np.float32(0.5))
    shape = node("shape", "Shape", [x], ir.DataType.INT64)
    above = node("above", "Greater", [x, threshold], ir.DataType.BOOL)
    chosen = node("chosen", "Where", [above.outputs[0], x, threshold])
    shaped = node("shaped", "Reshape", [chosen.outputs[0], shape.outputs[0]])
    lowered = to_half(model([shape, above, chosen, shaped], [threshold]), "float16")
    check_types(lowered, "float16")
    made = {found.name: found for found in lowered.graph}
    assert made["shape"].inputs[0].dtype in (FLOAT, FLOAT16) and made["shape"].outputs[0].dtype == ir.DataType.INT64
    assert made["above"].outputs[0].dtype == ir.DataType.BOOL
    assert made["shaped"].outputs[0].dtype == FLOAT16
    x_values = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    assert snr_db(run(lowered, x_values), np.maximum(x_values, 0.5)) > 60


def test_an_input_given_back_is_an_output_of_its_own() -> None:
    x = ir.Value(name="x")
    graph = model([node("same", "Cast", [x], to=FLOAT)], [])
    lowered = to_half(graph, "float16")
    values = np.ones((2, 64), np.float32)
    np.testing.assert_array_equal(run(lowered, values), values)
    assert [(value.name, value.dtype) for value in lowered.graph.outputs] == [("same.out", FLOAT)]


def test_unknown_nodes_are_named() -> None:
    with pytest.raises(InvalidInput, match="nowhere"):
        to_half(linear(weights()), "float16", ["nowhere"])


def test_control_flow_is_refused() -> None:
    x, yes = ir.Value(name="x"), initializer("yes", np.bool_(True))
    branches = []
    for name in ("then", "else"):
        inner = node(name, "Identity", [x])
        branches.append(ir.Graph([], inner.outputs, nodes=[inner], name=name))
    chosen = ir.node("If", [yes], {"then_branch": branches[0], "else_branch": branches[1]}, name="chosen")
    chosen.outputs[0].name, chosen.outputs[0].dtype = "chosen.out", FLOAT
    graph = model([node("first", "Identity", [x]), chosen], [yes])
    with pytest.raises(EngineError, match="'chosen'"):
        to_half(graph, "float16")
