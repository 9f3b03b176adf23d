"""Small ONNX graphs, computed by ONNX Runtime and by the interpreter of the package that Core ML would be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from runtime.bundle.signature import Array
from runtime.targets.coreml.engine import CoreML
from runtime.targets.coreml.interpret import Interpreter
from runtime.targets.coreml.package import Package, save
from runtime.targets.coreml.sdk import coremltools
from runtime.targets.coreml.translate import translate

Node = tuple[str, str, str, dict[str, Any]]
"""Operator, inputs and outputs (names separated by spaces), attributes."""


class Both(NamedTuple):
    """Outputs by name, and the operations of the package."""

    expected: dict[str, Array]
    got: dict[str, Array]
    operations: list[str]


def graph(
    nodes: Sequence[Node], inputs: Mapping[str, Array], constants: Mapping[str, Any], outputs: str, varying: bool
) -> onnx.ModelProto:
    """An ONNX model of opset 23. With `varying` the first axis of every input may have any length."""
    made = [
        helper.make_node(
            operator,
            [name if name != "-" else "" for name in reads.split()],
            writes.split(),
            name=f"{operator}_{index}",
            **attributes,
        )
        for index, (operator, reads, writes, attributes) in enumerate(nodes)
    ]
    infos = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            ["n", *array.shape[1:]] if varying and array.ndim else array.shape,
        )
        for name, array in inputs.items()
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs.split()]
    held = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in constants.items()
    ]
    for tensor, name in zip(held, constants, strict=True):
        tensor.name = name
    model = helper.make_model(
        helper.make_graph(made, "small", infos, results, held),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return inferred


Compute = Callable[..., Both]


@pytest.fixture(autouse=True)
def needs_coremltools() -> None:
    found = CoreML.available()
    if not found.compiles:
        pytest.skip(f"coreml: {found.reason}")


@pytest.fixture
def compute(tmp_path: Path) -> Compute:
    """Compute a graph both ways."""
    count = 0

    def both(
        nodes: Sequence[Node],
        inputs: Mapping[str, Array],
        constants: Mapping[str, Any],
        outputs: str,
        varying: bool = False,
    ) -> Both:
        nonlocal count
        count += 1
        import onnx_ir as ir

        ct = coremltools()
        model = graph(nodes, inputs, constants, outputs, varying)
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        names = outputs.split()
        expected = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        dims = {"n": ct.RangeDim(1, 64, default=2)}
        program = translate(ir.from_proto(model), dims)
        types = [
            ct.TensorType(
                name, ct.Shape((dims["n"], *array.shape[1:])), dtype=np.float32 if array.dtype.kind == "f" else np.int32
            )
            for name, array in inputs.items()
            if varying and array.ndim
        ]
        path = tmp_path / f"{count}.mlpackage"
        save(program, types, path)
        package = Package(path)
        given = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in inputs.items()}
        return Both(expected, Interpreter(package).predict(given), [operation.type for operation in package.operations])

    return both
