"""8-bit products in integers: what ONNX Runtime's own kernels make of the canonical graph, by other kernels; and what
stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import Compiled, Options
from runtime.errors import InvalidInput
from runtime.targets.lowering.activation_ranges import affine
from runtime.targets.onnxruntime.engine import ONNXRuntime, _exact_in_integers, _product_of_integers
from runtime.targets.onnxruntime.integers import cut_behind, first_behind, with_integer_products

CHANNELS, SIDE, OUTPUTS = 5, 9, 7
SCALE = np.float32(0.03)
CONVOLUTIONS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "3x3": ((3, 3), {"pads": [1, 1, 1, 1]}),
    "stride 2, padded at the end": ((3, 3), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    "1x1": ((1, 1), {}),
    "1x1, stride 2": ((1, 1), {"strides": [2, 2]}),
    "1x4, uneven": ((1, 4), {"pads": [0, 2, 0, 1], "strides": [1, 3]}),
    "5x2": ((5, 2), {}),
}


def quantized(name: str, codes: Array, scales: Array, axis: int) -> tuple[list[Any], list[Any]]:
    node = helper.make_node(
        "DequantizeLinear", [f"{name}.codes", f"{name}.scales"], [name], axis=axis, name=f"{name}/DequantizeLinear"
    )
    return [node], [numpy_helper.from_array(codes, f"{name}.codes"), numpy_helper.from_array(scales, f"{name}.scales")]


def model(nodes: list[Any], tensors: list[Any], taken: list[Any], given: list[str]) -> onnx.ModelProto:
    """Nodes over `restored`, which is x rounded to 8 bits."""
    rounding = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x.codes"], name="x/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", ["x.codes", "scale", "zero"], ["restored"], name="x.codes/DequantizeLinear"
        ),
    ]
    tensors = [*tensors, numpy_helper.from_array(SCALE, "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, taken)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given]
    graph = helper.make_graph(rounding + nodes, "g", ends, results, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def run(made: onnx.ModelProto, x: Array) -> list[Any]:
    """By the kernels of the nodes as they stand: nothing is fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(
        onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
            None, {"x": x}
        )
    )


def lowered(made: onnx.ModelProto, **ranges: tuple[float, float]) -> tuple[onnx.ModelProto, list[str]]:
    changed = ir.from_proto(made)
    names = with_integer_products(changed, {f"{name}/QuantizeLinear": limits for name, limits in ranges.items()})
    return ir.to_proto(changed), names


def convolution(kernel: tuple[int, int], attributes: dict[str, Any], group: int = 1) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (OUTPUTS * group, CHANNELS, *kernel), np.int8)
    nodes, tensors = quantized("weight", codes, rng.uniform(0.01, 0.02, OUTPUTS * group).astype(np.float32), 0)
    tensors.append(numpy_helper.from_array(rng.standard_normal(OUTPUTS * group).astype(np.float32), "bias"))
    nodes.append(
        helper.make_node("Conv", ["restored", "weight", "bias"], ["y"], name="conv", group=group, **attributes)
    )
    return model(nodes, tensors, ["batch", CHANNELS * group, "height", "width"], ["y"])


def kinds(made: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in made.graph.node}


@pytest.mark.parametrize(("kernel", "attributes"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(kernel: tuple[int, int], attributes: dict[str, Any]) -> None:
    made = convolution(kernel, attributes)
    changed, names = lowered(made)
    assert (
        names == ["y"]
        and "MatMulIntegerToFloat" in kinds(changed)
        and not kinds(changed) & {"Conv", "DequantizeLinear"}
    )
    for rows, height, width in ((1, SIDE, SIDE), (3, SIDE + 1, SIDE + 4)):
        x = np.random.default_rng(1).normal(0, 2, (rows, CHANNELS, height, width)).astype(np.float32)
        (found,), (wanted,) = run(changed, x), run(made, x)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_products_that_read_the_same_values() -> None:
    """Two MatMul and a Gemm: their inputs are rounded once."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for name in ("a", "b", "c"):
        more = quantized(
            name,
            rng.integers(-127, 128, (CHANNELS, OUTPUTS), np.int8),
            rng.uniform(0.01, 0.02, OUTPUTS).astype(np.float32),
            1,
        )
        nodes += more[0]
        tensors += more[1]
    tensors.append(numpy_helper.from_array(rng.standard_normal(OUTPUTS).astype(np.float32), "bias"))
    nodes += [helper.make_node("MatMul", ["restored", name], [f"y{name}"], name=f"product.{name}") for name in "ab"]
    nodes.append(helper.make_node("Gemm", ["restored", "c", "bias"], ["yc"], name="product.c"))
    made = model(nodes, tensors, ["rows", CHANNELS], ["ya", "yb", "yc"])
    changed, names = lowered(made)
    assert names == ["ya", "yb", "yc"] and [node.op_type for node in changed.graph.node].count("QuantizeLinear") == 1
    x = rng.standard_normal((4, CHANNELS)).astype(np.float32)
    for found, wanted in zip(run(changed, x), run(made, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_activation_ranges_are_used_and_padding_stays_zero() -> None:
    """SiLU's values: all codes are used, and the border of the convolution is exact."""
    made, span = convolution(*CONVOLUTIONS["3x3"]), (-0.28, 5.0)
    changed, _ = lowered(made, x=span)
    x = np.random.default_rng(1).uniform(*span, (2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    form = affine(*span)
    rounded = (form.step * (np.clip(np.round(x / np.float32(form.step)) + form.zero, 0, 255) - form.zero)).astype(
        np.float32
    )
    exact = onnx.ModelProto()
    exact.CopyFrom(made)
    del exact.graph.node[:2]
    exact.graph.node.insert(0, helper.make_node("Identity", ["x"], ["restored"]))
    np.testing.assert_allclose(run(changed, x)[0], run(exact, rounded)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reason", ["groups", "gaps", "float weights", "zero points", "blocks"])
def test_what_cannot_be_put_so_stays(reason: str) -> None:
    if reason == "groups":
        made = convolution((3, 3), {}, group=2)
    elif reason == "gaps":
        made = convolution((2, 2), {"dilations": [2, 2]})
    else:
        rng = np.random.default_rng(0)
        codes, scales = rng.integers(-127, 128, (CHANNELS, OUTPUTS), np.int8), np.ones(OUTPUTS, np.float32)
        nodes, tensors = quantized("w", codes, scales, 1)
        if reason == "float weights":
            nodes, tensors = [], [numpy_helper.from_array(codes.astype(np.float32), "w")]
        if reason == "zero points":
            nodes[0].input.append("w.zero")
            tensors.append(numpy_helper.from_array(np.arange(OUTPUTS, dtype=np.int8), "w.zero"))
        if reason == "blocks":
            tensors[1] = numpy_helper.from_array(np.ones((1, OUTPUTS), np.float32), "w.scales")
            del nodes[0].attribute[:]
            nodes[0].attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", CHANNELS)])
        made = model(
            [*nodes, helper.make_node("MatMul", ["restored", "w"], ["y"], name="product")],
            tensors,
            ["rows", CHANNELS],
            ["y"],
        )
    changed, names = lowered(made)
    assert not names and [node.op_type for node in changed.graph.node] == [node.op_type for node in made.graph.node]


def chain(layers: int) -> onnx.ModelProto:
    """Products one behind the other of what the first of them rounds anew; beside them, one of x alone that comes
    first.
    """
    rng = np.random.default_rng(0)
    nodes, tensors = quantized(
        "w", rng.integers(-127, 128, (CHANNELS, CHANNELS), np.int8), np.full(CHANNELS, 0.002, np.float32), 1
    )
    nodes.append(helper.make_node("MatMul", ["restored", "w"], ["aside"], name="aside"))
    last = "restored"
    for place in range(layers):
        nodes += [
            helper.make_node("MatMul", [last, "w"], [f"y{place}"], name=f"product{place}"),
            helper.make_node(
                "QuantizeLinear", [f"y{place}", "scale", "zero"], [f"c{place}"], name=f"y{place}/QuantizeLinear"
            ),
            helper.make_node(
                "DequantizeLinear", [f"c{place}", "scale", "zero"], [f"r{place}"], name=f"c{place}/DequantizeLinear"
            ),
        ]
        last = f"r{place}"
    return model(nodes, tensors, ["rows", CHANNELS], ["aside", last])


def test_a_part_is_what_a_product_needs() -> None:
    made = ir.from_proto(chain(4))
    names = ["aside", "y0", "y1", "y2", "y3"]
    assert [first_behind(made, names, count) for count in (1, 2, 3, 9)] == ["aside", "y1", "y2", "y3"]
    cut_behind(made, "y1")
    part = ir.to_proto(made)
    assert [value.name for value in part.graph.output] == ["y1"] and len(part.graph.node) == 7
    x = np.random.default_rng(1).standard_normal((3, CHANNELS)).astype(np.float32)
    whole = chain(4)
    whole.graph.output.append(helper.make_tensor_value_info("y1", TensorProto.FLOAT, None))
    np.testing.assert_array_equal(run(part, x)[0], run(whole, x)[-1])


def test_the_probe_of_exact_sums_is_a_model_of_the_standard() -> None:
    probe = onnx.load_from_string(_product_of_integers())
    assert [node.op_type for node in probe.graph.node] == ["MatMulIntegerToFloat"]
    assert isinstance(_exact_in_integers(), bool)


def test_the_engine_takes_what_is_faster_here(tmp_path: Path) -> None:
    """Compiled, loaded either way, and as measured; the tests' own default is integers where their sums are exact."""
    onnx.save(chain(30), tmp_path / "model.onnx")
    rows = Dim(name="rows", min=1, opt=8, max=64)
    x, *ends = (Tensor(name=name, dtype="float32", dims=(rows, CHANNELS)) for name in ("x", "aside", "r29"))
    signature = Signature(inputs=(x,), outputs=tuple(ends))
    submodel = Submodel(
        name="chain", signature=signature, graph="model.onnx", precision=Precision.parse("int8 W8A8"), nbytes=0
    )
    compiled = Compiled(ONNXRuntime.compile(submodel, tmp_path / "model.onnx", tmp_path / "out"), tmp_path / "out")
    assert compiled.artifact.files == ("chain.onnx", "chain.integers.onnx", "chain.floats.onnx")
    feed = {"x": np.random.default_rng(1).standard_normal((3, CHANNELS)).astype(np.float32)}
    found = {}
    for value in ("integers", "floats") if _exact_in_integers() else ("floats",):
        engine = ONNXRuntime.load(
            submodel, tmp_path, Options(threads=1, compiled=compiled, settings={"products": value})
        )
        assert engine.chosen == (f"products={value}: as set",)
        found[value] = engine.run(feed)["r29"]
    np.testing.assert_allclose(found.get("integers", found["floats"]), found["floats"], atol=1.01 * SCALE)
    default = ONNXRuntime.load(submodel, tmp_path, Options(threads=1, compiled=compiled))
    assert default.decisions["products"].value == ("integers" if _exact_in_integers() else "floats")
    with pytest.raises(InvalidInput, match="products: is set to 'half': this bundle allows"):
        ONNXRuntime.load(submodel, tmp_path, Options(compiled=compiled, settings={"products": "half"}))
    older = Compiled(compiled.artifact.model_copy(update={"files": ()}), tmp_path / "nothing")
    plain = ONNXRuntime.load(submodel, tmp_path, Options(threads=1, compiled=older))
    assert not plain.decisions and np.array_equal(plain.run(feed)["r29"], found["floats"])


def test_the_engine_measures_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINECAST_CHOICES")
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    onnx.save(chain(30), tmp_path / "model.onnx")
    x = Tensor(name="x", dtype="float32", dims=(Dim(name="rows", min=1, opt=8, max=64), CHANNELS))
    submodel = Submodel(
        name="chain",
        signature=Signature(inputs=(x,), outputs=()),
        graph="model.onnx",
        precision=Precision.parse("int8 W8A8"),
        nbytes=0,
    )
    compiled = Compiled(ONNXRuntime.compile(submodel, tmp_path / "model.onnx", tmp_path / "out"), tmp_path / "out")
    engine = ONNXRuntime.load(submodel, tmp_path, Options(threads=1, compiled=compiled))
    if _exact_in_integers():
        assert engine.decisions["products"].reason.startswith("measured on this processor: ")
