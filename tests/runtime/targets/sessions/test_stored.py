"""What a target stores: plans, graphs, weights of another type; and what a damaged file says."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.errors import EngineError
from runtime.targets.lowering.half import to_half
from runtime.targets.sessions.sessions import CPU, Device, open_session, values_of
from runtime.targets.sessions.stored import SessionPlan, load_graph, read_plan, read_weights, store


@pytest.fixture
def encoder(vlm_bundle: Path) -> tuple[Submodel, Path]:
    """The vision encoder, whose weights lie in float16, and its graph."""
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("vision_encoder")
    return submodel, bundle.root / submodel.graph


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_weights_of_another_type_lie_beside_the_graph(
    encoder: tuple[Submodel, Path], tmp_path: Path, half: str
) -> None:
    submodel, graph = encoder
    model = to_half(ir.load(graph), half)  # type: ignore[arg-type]
    changed = {
        n: v.const_value for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.LazyTensor)
    }
    files = store(tmp_path, submodel, SessionPlan(graph="vision_encoder.onnx"), {"vision_encoder.onnx": model})
    large = {name: tensor for name, tensor in changed.items() if tensor.nbytes >= 1024}
    assert ("vision_encoder.safetensors" in files) == bool(large)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files), "nothing temporary is left"
    assert (tmp_path / "vision_encoder.onnx").stat().st_size < 400_000
    assert read_plan(tmp_path, submodel.name).weights == ("vision_encoder.safetensors" if large else "")
    if not large:
        return
    found = read_weights(tmp_path / "vision_encoder.safetensors")
    assert set(found) == set(large)
    dtype = np.dtype(np.float16) if half == "float16" else np.dtype(ml_dtypes.bfloat16)
    for name, weight in found.items():
        assert weight.code == {"float16": 10, "bfloat16": 16}[half]
        np.testing.assert_array_equal(np.frombuffer(weight.data, dtype).reshape(weight.shape), large[name].numpy())


def test_the_file_is_one_of_safetensors(encoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    """The library itself reads it."""
    from safetensors.numpy import load_file

    submodel, graph = encoder
    model = ir.load(graph)
    weights = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    (cast, *_) = (node for node in model.graph if node.op_type == "Cast" and node.inputs[0].is_initializer())
    name = str(cast.inputs[0].name)
    model.graph.initializers[name].const_value = ir.LazyTensor(
        lambda: ir.tensor(weights, name=name), ir.DataType.FLOAT, ir.Shape(weights.shape), name=name
    )
    store(tmp_path, submodel, SessionPlan(graph="g.onnx"), {"g.onnx": model})
    np.testing.assert_array_equal(load_file(tmp_path / "vision_encoder.safetensors")[name], weights)


def test_a_session_reads_them_without_a_copy(encoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    submodel, graph = encoder
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 64]))
    weights = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weights.shape))
    w.const_value = ir.LazyTensor(
        lambda: ir.tensor(weights, name="w"), ir.DataType.FLOAT, ir.Shape(weights.shape), name="w"
    )
    product = ir.node("MatMul", [x, w], name="product")
    product.outputs[0].name, product.outputs[0].type = "y", x.type
    model = ir.Model(
        ir.Graph([x], [product.outputs[0]], nodes=[product], initializers=[w], opset_imports={"": 21}), ir_version=10
    )
    store(tmp_path, submodel, SessionPlan(graph="g.onnx"), {"g.onnx": model})
    values = values_of(tmp_path / "vision_encoder.safetensors")
    session = open_session(tmp_path / "g.onnx", graph.parent, Device(CPU), threads=1, converted=values)
    given = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": given})[0], given @ weights, rtol=1e-5)
    with pytest.raises(EngineError, match="could not compile"):
        open_session(tmp_path / "g.onnx", graph.parent, Device(CPU), threads=1)


@pytest.mark.parametrize("damage", ["missing", "empty", "no header", "short", "another type"])
def test_damaged_weights(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.safetensors"
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(16)
    broken = {
        "empty": b"",
        "no header": b"\xff" * 40,
        "short": content[:-4],
        "another type": content.replace(b"F32", b"F99"),
    }
    if damage != "missing":
        path.write_bytes(broken[damage])
    with pytest.raises(EngineError, match=r"could not load .*weights.safetensors"):
        read_weights(path)


def test_a_missing_plan(encoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"vision_encoder.json is missing. Build the bundle again for this target"):
        read_plan(tmp_path, encoder[0].name)
    (tmp_path / "vision_encoder.json").write_text('{"graph": "../secret.onnx"}')
    with pytest.raises(EngineError, match="is no name of a file"):
        read_plan(tmp_path, encoder[0].name)


def test_a_graph_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    with pytest.raises(EngineError, match=r"could not compile .*model.onnx: it cannot be read"):
        load_graph(tmp_path / "model.onnx")
