"""Every operator that is translated, computed from the package and by ONNX Runtime, at shapes that vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from runtime.bundle.signature import Array
from runtime.errors import EngineError
from runtime.targets.coreml.operators import OPERATORS
from runtime.targets.coreml.operators.elementwise import BINARY, REDUCTIONS, UNARY

few = settings(max_examples=3, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
lengths = st.integers(1, 5)
seeds = st.integers(0, 1000)
booleans = st.booleans()


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(both: Any, tolerance: float = 2e-6) -> None:
    """The same types and shapes (int64 is int32 there) and, but for rounding, values."""
    assert both.expected.keys() == both.got.keys()
    for name, wanted in both.expected.items():
        got = both.got[name]
        assert got.shape == wanted.shape, name
        kinds = {"int64": "int32", "bool": "float32"}
        assert got.dtype == kinds.get(wanted.dtype.name, wanted.dtype.name), name
        np.testing.assert_allclose(
            got.astype(np.float64),
            wanted.astype(np.float64),
            tolerance,
            tolerance * max(1, np.abs(wanted).max()),
            err_msg=name,
        )


@few
@given(seeds, lengths, lengths, booleans)
def test_of_one_input(compute: Any, seed: int, rows: int, columns: int, varying: bool) -> None:
    floats = [*sorted(set(UNARY) - {"Not", "Sqrt"}), "Neg", "Reciprocal", "Identity", "Softmax"]
    nodes = [(name, "x", name, {}) for name in floats] + [
        ("Gelu", "x", "gelu", {"approximate": "none"}),
        ("Gelu", "x", "gelu_tanh", {"approximate": "tanh"}),
        ("Softmax", "x", "softmax_0", {"axis": 0}),
        ("Abs", "x", "positive", {}),
        ("Sqrt", "positive", "sqrt", {}),
    ]
    same(
        compute(
            nodes, {"x": normal(seed, rows, columns)}, {}, " ".join([*floats, "gelu gelu_tanh softmax_0 sqrt"]), varying
        ),
        1e-5,
    )


@few
@given(seeds, lengths, lengths, booleans)
def test_of_two_inputs(compute: Any, seed: int, rows: int, columns: int, varying: bool) -> None:
    rng = np.random.default_rng(seed)
    inputs = {
        "x": normal(seed, rows, 1, columns),
        "y": normal(seed + 1, rows, 3, 1),
        "i": rng.integers(1, 9, (rows, 2)),
        "j": rng.integers(1, 9, (rows, 2)),
    }
    compared = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    arithmetic = ["Add", "Div", "Max", "Min", "Mul", "Sub"]
    nodes = [(name, "x y", name, {}) for name in arithmetic + compared] + [
        (name, "i j", f"{name}_i", {}) for name in arithmetic + compared
    ]
    nodes += [
        ("Abs", "x", "base", {}),
        ("Pow", "base y", "Pow", {}),
        ("And", "Less LessOrEqual", "And", {}),
        ("Or", "Less Greater", "Or", {}),
    ]
    nodes += [("Not", "Less", "Not", {}), ("Where", "Less x y", "Where", {})]
    assert {"Pow", "And", "Or", *arithmetic, *compared} >= set(BINARY)
    outputs = [*arithmetic, *(f"{name}_i" for name in arithmetic), "Pow", "Where"]
    truths = [*compared, *(f"{name}_i" for name in compared), "And", "Or", "Not"]
    nodes += [("Cast", name, f"{name}_cast", {"to": TensorProto.FLOAT}) for name in truths]
    same(compute(nodes, inputs, {}, " ".join([*outputs, *(f"{name}_cast" for name in truths)]), varying), 1e-5)


@few
@given(seeds, lengths, lengths, booleans, booleans)
def test_reductions(compute: Any, seed: int, rows: int, columns: int, varying: bool, keep: bool) -> None:
    nodes: list[Any] = [(name, "x axes", name, {"keepdims": int(keep)}) for name in REDUCTIONS]
    nodes += [
        ("ReduceMean", "x", "all", {"keepdims": int(keep)}),
        ("ArgMax", "x", "argmax", {"axis": -1, "keepdims": int(keep)}),
    ]
    constants = {"axes": np.array([1, -1])}
    same(
        compute(
            nodes, {"x": normal(seed, rows, 3, columns)}, constants, " ".join([*REDUCTIONS, "all", "argmax"]), varying
        )
    )


@few
@given(seeds, lengths, lengths, booleans)
def test_axes_and_shapes(compute: Any, seed: int, rows: int, columns: int, varying: bool) -> None:
    constants = {
        "kept": np.array([0, -1, 2]), "flat": np.array([-1]), "front": np.array([0, 3]), "last": np.array([-1]),
        "sizes": np.array([1, 3]),
        "three": np.array([3]), "zero": np.array(0), "one": np.array(1), "at": np.array(0.5, np.float32),
        "first": np.array([0]), "one_two": np.array([1, 2]),
    }  # fmt: skip
    nodes: list[Any] = [
        ("Reshape", "x kept", "reshaped", {}),
        ("Reshape", "x flat", "flat_x", {}),
        ("Transpose", "x", "reversed", {}),
        ("Transpose", "x", "moved", {"perm": [2, 0, 1]}),
        ("Unsqueeze", "x front", "longer", {}),
        ("Squeeze", "longer front", "back", {}),
        ("Concat", "x x", "joined", {"axis": -2}),
        ("Split", "x sizes", "part_1 part_2", {"axis": 1}),
        ("Split", "x", "half_1 half_2", {"axis": 1, "num_outputs": 2}),
        ("Shape", "x", "shape", {}),
        ("Shape", "x", "tail", {"start": -2}),
        ("Shape", "x", "rows", {"start": 0, "end": 1}),
        ("Squeeze", "rows first", "count", {}),
        ("Range", "zero count one", "numbers", {}),
        ("Reshape", "count flat", "vector", {}),
        ("Concat", "three rows", "wanted", {"axis": 0}),
        ("Expand", "at wanted", "spread", {}),
        ("Concat", "rows one_two", "repeats", {"axis": 0}),
        ("Tile", "x repeats", "tiled", {}),
        ("Less", "numbers count", "truths", {}),
        ("Expand", "truths wanted", "spread_truths", {}),
        ("Cast", "spread_truths", "spread_numbers", {"to": TensorProto.INT64}),
        ("Reshape", "x computed", "by_shape", {}),
    ]
    nodes.insert(-1, ("Concat", "rows flat", "computed", {"axis": 0}))
    outputs = (
        "reshaped flat_x reversed moved longer back joined part_1 part_2 half_1 half_2 shape tail numbers vector "
        "spread tiled"
    )
    same(
        compute(nodes, {"x": normal(seed, rows, 4, columns)}, constants, f"{outputs} spread_numbers by_shape", varying)
    )


@few
@given(seeds, st.integers(2, 6), st.data(), booleans)
def test_slices(compute: Any, seed: int, rows: int, data: Any, varying: bool) -> None:
    start, stop = data.draw(st.integers(-5, 4)), data.draw(st.sampled_from([-1, 3, 5, 2**31 - 1, 2**63 - 1]))
    step = data.draw(st.integers(1, 3))
    constants = {
        **{
            "start": np.array([start, 0]),
            "stop": np.array([stop, -1]),
            "axes": np.array([1, 2]),
            "steps": np.array([step, 1]),
        },
        **{"first": np.array([0]), "end": np.array([2**63 - 1]), "one": np.array([1])},
    }
    nodes: list[Any] = [
        ("Slice", "x start stop axes steps", "sliced", {}),
        ("Shape", "x", "rows", {"start": 0, "end": 1}),
        ("Sub", "rows one", "before_last", {}),
        ("Slice", "x before_last end first one", "last", {}),
        ("Slice", "x first before_last first one", "others", {}),
    ]
    both = compute(nodes, {"x": normal(seed, rows, 5, 3)}, constants, "sliced last others", varying)
    if both.expected["sliced"].size:
        same(both)


@few
@given(seeds, lengths, booleans, booleans)
def test_gathering(compute: Any, seed: int, count: int, varying: bool, large: bool) -> None:
    table = normal(seed, 1200 if large else 7, 4).astype(np.float16)
    ids = np.random.default_rng(seed).integers(0, 7, (count, 3))
    nodes: list[Any] = [
        ("Gather", "table ids", "rows", {}),
        ("Cast", "rows", "wide", {"to": TensorProto.FLOAT}),
        ("Gather", "wide place", "columns", {"axis": 2}),
        ("Gather", "table fixed", "known", {}),
        ("Cast", "known", "known_wide", {"to": TensorProto.FLOAT}),
        ("GatherND", "wide pairs", "picked", {}),
    ]
    constants = {
        "table": table,
        "place": np.array([1, 3]),
        "fixed": np.array([[6, 0]]),
        "pairs": np.array([[0, 1], [count - 1, 2]]),
    }
    both = compute(nodes, {"ids": ids}, constants, "wide columns known_wide picked", varying)
    same(both)


NEAREST: Any = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


@few
@given(seeds, st.integers(3, 7), st.integers(3, 7), st.data(), booleans)
def test_convolutions(compute: Any, seed: int, height: int, width: int, data: Any, varying: bool) -> None:
    groups, (down, across) = (
        data.draw(st.sampled_from([1, 2])),
        data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
    )
    pads = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    dilations = data.draw(st.sampled_from([[1, 1], [1, 2]]))
    attributes = {"strides": [down, across], "pads": pads, "dilations": dilations, "group": groups}
    if pads[1] + pads[3] + width < 1 + 2 * dilations[1]:
        return
    constants = {
        "w": normal(seed, 6, 4 // groups, 3, 3),
        "b": normal(seed + 1, 6),
        "scales": np.array([1, 1, 2, 3], np.float32),
        "sizes": np.array([2, 4, 2 * height - 1, 2 * width]),
        "whole": np.array([2, 4, 2 * height, 3 * width]),
    }
    nodes: list[Any] = [
        ("Conv", "x w b", "y", attributes),
        ("Conv", "x w", "z", {"group": groups, "pads": [1, 1, 1, 1]}),
        ("Resize", "x - scales", "larger", NEAREST),
        ("Resize", "x - - sizes", "of_size", NEAREST),
        ("Resize", "x - - whole", "of_whole", NEAREST),
    ]
    outputs = "y z larger of_size of_whole"
    same(compute(nodes, {"x": normal(seed + 2, 2, 4, height, width)}, constants, outputs, varying), 1e-5)


@few
@given(seeds, lengths, lengths, booleans)
def test_normalizations(compute: Any, seed: int, rows: int, columns: int, varying: bool) -> None:
    constants = {"c": normal(seed, 6), "d": normal(seed + 1, 6), "e": normal(seed, 3), "f": normal(seed, 3)}
    nodes: list[Any] = [
        ("GroupNormalization", "x c d", "grouped", {"num_groups": 3, "epsilon": 1e-6}),
        ("LayerNormalization", "x e f", "layered", {"epsilon": 1e-5}),
        ("LayerNormalization", "x e", "no_bias", {"axis": -1}),
    ]
    x = 5 + 3 * normal(seed + 2, rows, 6, columns, 3)
    same(compute(nodes, {"x": x}, constants, "grouped layered no_bias", varying), 2e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_groups_are_normalized_in_half_whatever_their_size(compute: Any, size: float) -> None:
    """Where squares exceed 65504, and where they are next to nothing beside epsilon."""
    x = (size * np.random.default_rng(0).uniform(-1, 1, (2, 6, 9, 9))).astype(np.float32)
    nodes: list[Any] = [
        ("Cast", "x", "half", {"to": TensorProto.FLOAT16}),
        ("GroupNormalization", "half c d", "y", {"num_groups": 2, "epsilon": 1e-6}),
        ("Cast", "y", "wide", {"to": TensorProto.FLOAT}),
    ]
    constants = {"c": np.ones(6, np.float16), "d": np.zeros(6, np.float16)}
    both = compute(nodes, {"x": x}, constants, "wide")
    grouped = x.reshape(2, 2, 3, 9, 9).astype(np.float64)
    axes = (2, 3, 4)
    wanted = (grouped - grouped.mean(axes, keepdims=True)) / np.sqrt(grouped.var(axes, keepdims=True) + 1e-6)
    assert np.abs(both.got["wide"].reshape(grouped.shape) - wanted).max() < 5e-3


@few
@given(
    seeds,
    lengths,
    lengths,
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from(["none", "bool", "float"]),
    booleans,
)
def test_attention(compute: Any, seed: int, batch: int, sequence: int, heads: Any, masked: str, varying: bool) -> None:
    rng = np.random.default_rng(seed)
    inputs = {
        "q": normal(seed, batch, heads[0], sequence, 8),
        "k": normal(seed + 1, batch, heads[1], 5, 8),
        "v": normal(seed + 2, batch, heads[1], 5, 8),
    }
    constants: dict[str, Any] = {}
    if masked != "none":
        allowed = rng.random((1, 1, sequence, 5)) < 0.6
        allowed[..., 0] = True
        constants["mask"] = allowed if masked == "bool" else np.where(allowed, 0, -3).astype(np.float32)
    names = "q k v mask" if constants else "q k v"
    nodes: list[Any] = [("Attention", names, "usual", {}), ("Attention", names, "scaled", {"scale": 0.7})]
    same(compute(nodes, inputs, constants, "usual scaled", varying), 1e-5)


def int4(values: Array) -> Any:
    return helper.make_tensor("codes", TensorProto.INT4, values.shape, values.astype(np.int8).flatten().tolist())


@few
@given(seeds, lengths, st.sampled_from(["float32", "float16", "int8", "int8 offset", "int4"]), booleans, booleans)
def test_weights_stay_as_they_are_stored(
    compute: Any, seed: int, rows: int, kind: str, biased: bool, varying: bool
) -> None:
    """Products with weights of every kind, in the order of the canonical graph, with the bias that follows."""
    rng = np.random.default_rng(seed)
    shape = (128, 40)
    constants: dict[str, Any] = {"bias": normal(seed, 40)}
    codes = rng.integers(-8, 8, shape)
    if kind in ("float32", "float16"):
        constants["stored"] = normal(seed, *shape).astype(kind)
        nodes: list[Any] = [("Cast", "stored", "w", {"to": TensorProto.FLOAT})]
    elif kind == "int4":
        constants |= {"stored": int4(codes), "scale": np.abs(normal(seed, 2, 40)).astype(np.float16)}
        nodes = [
            ("Cast", "scale", "wide", {"to": TensorProto.FLOAT}),
            ("DequantizeLinear", "stored wide", "w", {"axis": 0, "block_size": 64}),
        ]
    else:
        constants |= {
            "stored": codes.astype(np.int8),
            "scale": np.abs(normal(seed, 40)),
            "offset": rng.integers(-2, 3, 40).astype(np.int8),
        }
        nodes = [("DequantizeLinear", "stored scale offset" if "offset" in kind else "stored scale", "w", {"axis": 1})]
    nodes += [("MatMul", "x w", "product", {}), ("Add", "product bias" if biased else "product product", "y", {})]
    nodes += [
        ("Transpose", "w", "turned", {}),
        ("Gemm", "flat turned bias", "gemm", {"transB": 1}),
        ("MatMul", "x4 w", "of_four", {}),
    ]
    inputs = {"x": normal(seed, rows, 3, 128), "flat": normal(seed, rows, 128), "x4": normal(seed, rows, 1, 2, 128)}
    both = compute(nodes, inputs, constants, "y gemm of_four", varying)
    same(both, 1e-5)
    wanted = {"float32": "const", "float16": "constexpr_cast"}.get(kind, "constexpr_blockwise_shift_scale")
    assert wanted in both.operations and "transpose" not in both.operations
    assert both.operations.count("linear") == 2 and both.operations.count("add") == (0 if biased else 1)


@few
@given(seeds, lengths, st.sampled_from(["int8", "uint8"]), booleans, booleans)
def test_quantized_activations_are_the_same_numbers(
    compute: Any, seed: int, rows: int, kind: str, along: bool, varying: bool
) -> None:
    offset = np.array([0, 3, 5], kind) if along else np.array(7 if kind == "uint8" else 0, kind)
    scale = np.array([0.02, 0.01, 0.5], np.float32) if along else np.array(0.02, np.float32)
    nodes: list[Any] = [
        ("QuantizeLinear", "x scale offset", "codes", {"axis": 1}),
        ("DequantizeLinear", "codes scale offset", "y", {"axis": 1}),
    ]
    both = compute(nodes, {"x": 3 * normal(seed, rows, 3, 7)}, {"scale": scale, "offset": offset}, "y", varying)
    same(both, 1e-6)
    assert {"quantize", "dequantize"} <= set(both.operations)


REFUSED: dict[str, Any] = {
    "no translation to Core ML": ("Xor", "flag flag", {}),
    "holds no tensor": ("Constant", "", {"value_float": 1.0}),
    "casts to double": ("Cast", "x", {"to": TensorProto.DOUBLE}),
    "has 1 inputs": ("Max", "x", {}),
    "takes the last of equals": ("ArgMax", "x", {"select_last_index": 1}),
    "goes backwards": ("Slice", "x end start axis back", {}),
    "is not nearest, asymmetric and floor": ("Resize", "x - scales", {"mode": "linear"}),
    "is causal by itself": ("Attention", "x x x", {"is_causal": 1}),
    "has heads packed": ("Attention", "packed packed packed", {"q_num_heads": 1, "kv_num_heads": 1}),
    "scales or transposes": ("Gemm", "flat weight", {"alpha": 2.0}),
    "multiplies by what is computed": ("Gemm", "flat flat", {"transB": 1}),
    "pads by itself": ("Conv", "x kernel", {"auto_pad": "SAME_UPPER"}),
    "has a computed scale": ("DequantizeLinear", "codes positive", {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_translated_is_refused_by_name(compute: Any, what: str) -> None:
    operator, reads, attributes = REFUSED[what]
    nodes: list[Any] = [
        ("Less", "flat flat", "flag", {}),
        ("Reshape", "x three", "packed", {}),
        ("ReduceMean", "flat", "positive", {"keepdims": 0}),
        (operator, reads, "y", attributes),
    ]
    constants = {
        **{
            "start": np.array([0]),
            "end": np.array([3]),
            "axis": np.array([2]),
            "back": np.array([-1]),
            "three": np.array([1, 4, -1]),
        },
        **{"scales": np.array([1, 1, 2, 2], np.float32), "codes": np.ones((2, 2), np.int8)},
        **{"weight": normal(0, 4, 4), "kernel": normal(0, 4, 1, 3, 3)},
    }
    with pytest.raises(EngineError, match=what) as caught:
        compute(nodes, {"x": normal(0, 1, 1, 4, 4), "flat": normal(0, 3, 4)}, constants, "y")
    assert operator in str(caught.value)


def test_every_operator_is_tried() -> None:
    """Of what this file has no test of its own: those that only states have, tested with the engine."""
    source = Path(__file__).read_text().partition("def test_every_operator_is_tried")[0]
    tried = {name for name in OPERATORS if f'"{name}"' in source} | set(UNARY) | set(BINARY) | set(REDUCTIONS)
    assert set(OPERATORS) - tried == {"TensorScatter"}
