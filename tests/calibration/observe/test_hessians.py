"""Second moments of a graph's tensors: those of their rows, however many stretches the graph is run in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from calibration.observe import hessians as module
from calibration.observe.hessians import Hessian, hessians
from calibration.observe.lean import lean_session
from runtime.errors import InvalidInput

Floats = NDArray[np.float32]
WEIGHTS = [np.random.default_rng(seed).standard_normal((16, 16)).astype(np.float32) for seed in range(3)]
SAMPLES = [{"x": np.random.default_rng(10 + i).standard_normal((2, 3 + i, 16)).astype(np.float32)} for i in range(3)]


def model() -> ir.Model:
    """x [batch, sequence, 16] -> three times MatMul, Relu and the sum with x -> the last position -> MatMul."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="toy")
    for i, array in enumerate(WEIGHTS):
        constant(graph, f"w{i}", array)
    for name, number in (("start", -1), ("end", 1 << 31), ("axis", 1)):
        constant(graph, name, np.array([number], np.int64))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", 16]))
    graph.inputs.append(x)
    value = x
    for i in range(3):
        product = put(graph, "MatMul", [value, graph.initializers[f"w{i}"]], f"product{i}", None)
        value = put(graph, "Relu", [product], f"relu{i}", None)
        value = put(graph, "Add", [value, x], f"sum{i}", ["batch", "sequence", 16])
    last = put(
        graph,
        "Slice",
        [value, *(graph.initializers[name] for name in ("start", "end", "axis"))],
        "last",
        ["batch", 1, 16],
    )
    graph.outputs.append(put(graph, "MatMul", [last, graph.initializers["w0"]], "y", ["batch", 1, 16]))
    return ir.Model(graph, ir_version=10)


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> None:
    tensor = ir.tensor(array, name=name)
    graph.register_initializer(
        ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    )


def put(graph: ir.Graph, op: str, inputs: list[ir.Value], output: str, shape: list[int | str] | None) -> ir.Value:
    node = ir.node(op, inputs, name=f"{output}/{op}")
    value = node.outputs[0]
    value.name, value.dtype, value.shape = output, ir.DataType.FLOAT, None if shape is None else ir.Shape(shape)
    graph.append(node)
    return value


def expected() -> dict[str, Floats]:
    """Rows of each tensor over all calls."""
    found: dict[str, list[Floats]] = {}
    for sample in SAMPLES:
        x = value = sample["x"]
        for i, weights in enumerate(WEIGHTS):
            value = np.maximum(value @ weights, 0) + x
            found.setdefault(f"sum{i}", []).append(value.reshape(-1, 16))
        found.setdefault("x", []).append(x.reshape(-1, 16))
    rows = {name: np.concatenate(parts) for name, parts in found.items()}
    return rows | {"last": rows["sum2"]}


@pytest.mark.parametrize(("gathered", "kept"), [(1 << 30, 1 << 30), (1, 1 << 30), (1, 1), (5000, 1 << 30)])
def test_moments_of_all_rows(monkeypatch: pytest.MonkeyPatch, gathered: int, kept: int) -> None:
    """In one stretch or one for each tensor, each starting from what the last one left or from the inputs. `last`
    counts every position.
    """
    monkeypatch.setattr(module, "GATHERED_BYTES", gathered)
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    wanted = expected()
    found = dict(hessians(model(), ["last", "sum0", "x", "sum1"], SAMPLES))
    assert list(found) == ["x", "sum0", "sum1", "last"]
    for name, (matrix, rows) in found.items():
        assert rows == len(wanted[name]) == 24
        np.testing.assert_allclose(matrix, wanted[name].T @ wanted[name], rtol=1e-5, atol=1e-4)


def test_later_stretches_start_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node is computed twice."""
    monkeypatch.setattr(module, "GATHERED_BYTES", 1)
    stretches: list[ir.Model] = []

    def session(graph: ir.Model) -> ort.InferenceSession:
        stretches.append(graph)
        return lean_session(graph)

    monkeypatch.setattr(module, "lean_session", session)
    list(hessians(model(), ["sum0", "sum1", "sum2"], SAMPLES))
    products = [
        node.outputs[0].name
        for graph in stretches[1:]
        for node in graph.graph
        if str(node.outputs[0].name).startswith("product")
    ]
    assert products == ["product0", "product1", "product2"]


def test_divided_is_that_of_divided_rows() -> None:
    rows, scales = SAMPLES[0]["x"].reshape(-1, 16), np.linspace(0.1, 9, 16, dtype=np.float32)
    found = Hessian(rows.T @ rows, len(rows)).divided(scales)
    np.testing.assert_allclose(found.matrix, (rows / scales).T @ (rows / scales), rtol=1e-4, atol=1e-5)
    assert found.rows == len(rows)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_finite_is_refused(number: float) -> None:
    x = SAMPLES[0]["x"].copy()
    x[1, 2, 5] = number
    with pytest.raises(
        InvalidInput, match="tensor 'x' of toy holds NaN, infinity or magnitudes whose squares exceed float32"
    ):
        list(hessians(model(), ["x"], [*SAMPLES, {"x": x}]))


def test_nothing_to_run_on() -> None:
    assert list(hessians(model(), [], [])) == []
    with pytest.raises(InvalidInput, match="are none"):
        list(hessians(model(), ["x"], []))
    with pytest.raises(InvalidInput, match="has no tensor other"):
        list(hessians(model(), ["x", "other"], SAMPLES))
    with pytest.raises(InvalidInput, match="'product0' has no fixed number of channels"):
        list(hessians(model(), ["product0"], SAMPLES))
