"""Constants: dequantized as ONNX Runtime does, read only when they are written, never computed with by coremltools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime.errors import EngineError
from runtime.targets.coreml.constants import Constant, Deferred, dequantize, of_tensor
from runtime.targets.coreml.package import Package, save
from runtime.targets.coreml.translate import translate


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.booleans())
def test_blocks_are_dequantized_as_onnxruntime_does(
    seed: int, blocks: int, columns: int, size: int, shifted: bool
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (blocks * size, columns)).astype(np.int8)
    scale = rng.random((blocks, columns)).astype(np.float32)
    offset = rng.integers(-9, 9, scale.shape).astype(np.int8) if shifted else None
    held = {"codes": codes, "scale": scale} | ({} if offset is None else {"offset": offset})
    node = helper.make_node("DequantizeLinear", list(held), ["y"], axis=0, block_size=size)
    graph = helper.make_graph(
        [node],
        "g",
        [],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = onnxruntime.InferenceSession(
        onnx.shape_inference.infer_shapes(model).SerializeToString(), options
    ).run(["y"], {})
    np.testing.assert_array_equal(dequantize(codes, scale, offset), expected)
    turned = Constant(codes.shape, "int8", "float32", lambda: codes, scale, offset).transposed((1, 0))
    assert turned.shape == (columns, blocks * size) and turned.blocks == (1, size)
    np.testing.assert_array_equal(turned.array(), expected.T)


def test_a_deferred_constant_is_only_read_to_be_written() -> None:
    read: list[int] = []

    def values() -> Any:
        read.append(1)
        return np.arange(6, dtype=np.int8).reshape(2, 3)

    deferred = Deferred.of((2, 3), np.int8, values)
    assert deferred.shape == (2, 3) and deferred.dtype == np.int8 and deferred.strides == (0, 0)
    for attempt in (
        lambda: deferred + 1,
        lambda: deferred[0],
        lambda: deferred.T,
        lambda: np.take(deferred, 0),
        lambda: deferred.astype(float),
    ):
        with pytest.raises(NotImplementedError):
            attempt()
    assert not read
    np.testing.assert_array_equal(deferred.flatten(), np.arange(6))
    assert read == [1]


def test_types_without_a_form_are_refused() -> None:
    tensor = ir.tensor(np.zeros(3), dtype=ir.DataType.DOUBLE, name="wide")
    assert of_tensor(tensor).stored == "float64"
    eight = helper.make_tensor("eight", TensorProto.FLOAT8E4M3FN, [2], [1.0, 2.0])
    with pytest.raises(EngineError, match=r"'eight' is float8e4m3fn, .* choose another --quant"):
        of_tensor(ir.from_proto(eight))


def test_weights_are_read_one_after_another_when_the_package_is_written(tmp_path: Path) -> None:
    """None while the program is made; then each is reported, and at most one is in memory."""
    from onnx_ir import ExternalTensor

    rows, columns, layers = 256, 256, 8
    data = np.random.default_rng(0).standard_normal((layers, rows, columns)).astype(np.float16)
    (tmp_path / "weights.bin").write_bytes(data.tobytes())
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, rows]))
    nodes, value, held = [], x, []
    for layer in range(layers):
        tensor = ExternalTensor(
            "weights.bin",
            layer * data[0].nbytes,
            data[0].nbytes,
            ir.DataType.FLOAT16,
            shape=ir.Shape([rows, columns]),
            name=f"w{layer}",
            base_dir=tmp_path,
        )
        weight = ir.Value(
            name=f"w{layer}", type=ir.TensorType(ir.DataType.FLOAT16), shape=tensor.shape, const_value=tensor
        )
        held.append(weight)
        nodes.append(ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"cast{layer}"))
        nodes[-1].outputs[0].shape = tensor.shape
        nodes.append(ir.node("MatMul", [value, nodes[-1].outputs[0]], name=f"matmul{layer}"))
        value = nodes[-1].outputs[0]
    value.name = "y"
    model = ir.Model(ir.Graph([x], [value], nodes=nodes, initializers=held, opset_imports={"": 23}), ir_version=10)
    reported: list[int] = []

    def report(nbytes: int) -> None:
        reported.append(nbytes)
        assert sum(weight.const_value.raw is not None for weight in held) == 0, "each is let go of when it was copied"

    program = translate(model, {}, (), report)
    assert not reported
    save(program, [], tmp_path / "m.mlpackage")
    assert reported == [data[0].nbytes] * layers
    package = Package(tmp_path / "m.mlpackage")
    blobs = [
        operation.inputs["source_val"].arguments[0].value
        for operation in package.operations
        if operation.type == "constexpr_cast"
    ]
    for layer, blob in enumerate(blobs):
        np.testing.assert_array_equal(
            package.blob(blob.blobFileValue.offset, "float16", (columns, rows)), data[layer].T
        )
