"""Zero points and bfloat16 attention on OpenVINO: less noise at int8, borders as they were, nothing that the bundle
does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import Engine, Options
from runtime.errors import EngineError
from runtime.placing import choices
from runtime.placing.containers import Allowance
from runtime.targets.openvino import deciding
from runtime.targets.openvino.engine import OpenVINO
from runtime.targets.openvino.settings import has_bfloat16, shared_core

BATCH = Dim(name="batch", min=1, opt=1, max=2)
LENGTH = Dim(name="length", min=1, opt=16, max=64)
CHANNELS, SIDE, HEADS, SIZE = 8, 12, 2, 16
PEAK, LOW = 4.0, -0.28


def saved(folder: Path, nodes: list[Any], tensors: list[Any], inputs: dict[str, list[Any]], output: list[Any]) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    graph = helper.make_graph(
        nodes, "g", ends, [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)], tensors
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), folder / "model.onnx"
    )


def convolution(folder: Path) -> tuple[Submodel, Array]:
    """SiLU(x), int8 with one symmetric scale, convolved with int8 weights [8, 8, 3, 3] over zero padding; and the
    weights.
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3), np.int8)
    scales = np.full(CHANNELS, 0.001, np.float32)
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["x", "gate"], ["silu"]),
        helper.make_node("QuantizeLinear", ["silu", "scale", "zero"], ["silu.int8"], name="silu/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", ["silu.int8", "scale", "zero"], ["silu.restored"], name="silu.int8/DequantizeLinear"
        ),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=0),
        helper.make_node("Conv", ["silu.restored", "weight"], ["y"], pads=[1, 1, 1, 1], name="conv"),
    ]
    tensors = [
        numpy_helper.from_array(np.float32(PEAK / 127), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(codes, "codes"),
        numpy_helper.from_array(scales, "scales"),
    ]
    dims = ["batch", CHANNELS, SIDE, SIDE]
    saved(folder, nodes, tensors, {"x": dims}, dims)
    x, y = (Tensor(name=name, dtype="float32", dims=(BATCH, CHANNELS, SIDE, SIDE)) for name in "xy")
    signature = Signature(inputs=(x,), outputs=(y,))
    submodel = Submodel(
        name="conv", signature=signature, graph="model.onnx", precision=Precision.parse("int8 W8A8"), nbytes=0
    )
    return submodel, codes * np.float32(0.001)


def convolved(silu: Array, weight: Array) -> Array:
    padded = np.pad(silu, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, weight, dtype=np.float64)


def snr_db(wanted: Array, found: Array) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


def load(submodel: Submodel, folder: Path) -> Engine:
    return OpenVINO.load(submodel, folder, Options(threads=1))


def test_zero_points_halve_the_noise_and_keep_the_border(tmp_path: Path) -> None:
    submodel, weight = convolution(tmp_path)
    x = np.random.default_rng(1).uniform(-5, PEAK, (1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    wanted = convolved(x / (1 + np.exp(-x)), weight)
    found = {}
    for name, ranges in (("symmetric", {}), ("affine", {"silu/QuantizeLinear": (LOW, PEAK)})):
        engine = load(submodel.model_copy(update={"activation_ranges": ranges}), tmp_path)
        y = engine.run({"x": x})["y"]
        found[name] = snr_db(wanted, y), snr_db(wanted[:, :, 0], y[:, :, 0])
        engine.close()
    print({name: f"{inner:.1f} dB, {border:.1f} dB at the border" for name, (inner, border) in found.items()})
    assert found["affine"][0] > found["symmetric"][0] + 3
    assert found["affine"][1] > found["symmetric"][1] + 2, "padding stays exactly zero"


def test_ranges_of_another_graph_are_refused(tmp_path: Path) -> None:
    submodel, _ = convolution(tmp_path)
    for name in ("silu", "conv", "other/QuantizeLinear"):
        with pytest.raises(EngineError, match=name):
            load(submodel.model_copy(update={"activation_ranges": {name: (LOW, PEAK)}}), tmp_path)


def attention(folder: Path) -> Submodel:
    """y = -Attention(q, k, v) over heads of 16."""
    dims = ["batch", HEADS, "length", SIZE]
    nodes = [
        helper.make_node("Attention", ["q", "k", "v"], ["attended"], name="attn/Attention", scale=0.25),
        helper.make_node("Neg", ["attended"], ["y"], name="neg"),
    ]
    saved(folder, nodes, [], dict.fromkeys(("q", "k", "v"), dims), dims)
    tensors = [Tensor(name=name, dtype="float32", dims=(BATCH, HEADS, LENGTH, SIZE)) for name in "qkvy"]
    signature = Signature(inputs=tuple(tensors[:3]), outputs=tuple(tensors[3:]))
    return Submodel(
        name="attn", signature=signature, graph="model.onnx", precision=Precision.parse("float32"), nbytes=0
    )


def test_only_the_named_attention_computes_in_bfloat16(tmp_path: Path) -> None:
    if not has_bfloat16(shared_core()):
        pytest.skip("this processor has no bfloat16")
    submodel = attention(tmp_path)
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((1, HEADS, 32, SIZE)).astype(np.float32) for name in "qkv"}
    scores = np.einsum("bhid,bhjd->bhij", feed["q"], feed["k"]).astype(np.float64) * 0.25
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = -np.einsum("bhij,bhjd->bhid", shares / shares.sum(-1, keepdims=True), feed["v"])
    found = {}
    for names in ((), ("attn/Attention",), ("another/Attention",)):
        engine = load(submodel.model_copy(update={"bfloat16": names}), tmp_path)
        found[names] = snr_db(wanted, engine.run(feed)["y"])
        assert ("attention in bfloat16" in engine.device) == bool(names)
        engine.close()
    print({names: f"{ratio:.1f} dB" for names, ratio in found.items()})
    assert found[()] > 100 and found["another/Attention",] > 100
    assert 35 < found["attn/Attention",] < 70


@pytest.mark.parametrize("slow", ["bfloat16", "float32"])
def test_the_faster_attention_on_this_processor_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Real parts, compiled and run; what they take is planted."""
    if not has_bfloat16(shared_core()):
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.setattr(deciding, "UNWORTHY", 0)
    monkeypatch.setattr(choices, "_known", {})
    made: list[Any] = []
    prepare = deciding._Parts.__call__

    def planted(parts: Any, values: Mapping[str, str]) -> Any:
        run = prepare(parts, values)
        made.append(dict(values))
        run()
        return lambda: 2.0 if values["attention"] == slow else 1.0

    monkeypatch.setattr(deciding._Parts, "__call__", planted)
    monkeypatch.setattr(choices, "seconds", lambda part: part())
    submodel = attention(tmp_path).model_copy(update={"bfloat16": ("attn/Attention",)})
    engine = load(submodel, tmp_path)
    assert engine.decisions["attention"].value != slow and engine.decisions["shapes"].value == "any"
    assert ("attention in bfloat16" in engine.device) == (slow == "float32")
    assert engine.chosen[0].startswith(f"attention={engine.decisions['attention'].value}: measured on this processor")
    feed = {name: np.random.default_rng(0).standard_normal((1, HEADS, 32, SIZE)).astype(np.float32) for name in "qkv"}
    exact = OpenVINO.load(submodel, tmp_path, Options(threads=1, settings={"attention": "float32"})).run(feed)["y"]
    assert np.array_equal(engine.run(feed)["y"], exact) == (slow == "bfloat16")
    timed = len(made)
    assert load(submodel, tmp_path).decisions == engine.decisions and len(made) == timed, (
        "what was decided is not measured again"
    )
    set_by_hand = OpenVINO.load(submodel, tmp_path, Options(settings={"attention": slow}))
    assert set_by_hand.decisions["attention"].reason == "as set"


def test_choices_are_measured_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.setattr(deciding, "UNWORTHY", 0)
    submodel = attention(tmp_path).model_copy(update={"bfloat16": ("attn/Attention",)})
    engine = load(submodel, tmp_path)
    assert all(decision.reason.startswith("measured on this processor") for decision in engine.decisions.values())
    (one,) = choices.measured("openvino", OpenVINO.available().version)
    assert dict(one.values) == {name: decision.value for name, decision in engine.decisions.items()} and one.default > 0


def test_little_work_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choices.VARIABLE)
    engine = load(attention(tmp_path), tmp_path)
    assert engine.decisions["shapes"] == choices.Decision(
        "any", "default, not measured: it has too little work to be worth it"
    )


def test_threads_are_open_where_cores_run_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "allowance", lambda: Allowance(cpus=2))
    submodel = attention(tmp_path)
    for cores, values in ((1, {"threads": "all"}), (2, {}), (0, {})):
        monkeypatch.setattr(deciding, "cores", lambda cores=cores: cores)
        engine = OpenVINO.load(submodel, tmp_path, Options(settings=values))
        assert ("threads" in engine.decisions) == bool(values)
        wanted = {"threads": "2"} if values else {}
        assert {name: str(engine._compiled.get_property("INFERENCE_NUM_THREADS")) for name in wanted} == wanted
    assert "threads" not in load(submodel, tmp_path).decisions, "who says how many threads has decided"


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_tables_are_looked_up_in_as_they_are_stored(tmp_path: Path, dtype: int) -> None:
    values = np.random.default_rng(0).standard_normal((50, SIZE)).astype(np.float32)
    table = numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(dtype)), "table")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"]),
        helper.make_node("Cast", ["found"], ["y"], to=TensorProto.FLOAT),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", SIZE])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [ids], [y], [table]), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    onnx.save(model, tmp_path / "model.onnx")
    submodel = Submodel(
        name="token_embedding",
        signature=Signature(
            inputs=(Tensor(name="ids", dtype="int64", dims=(BATCH, LENGTH), values="below", limit=50),),
            outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, LENGTH, SIZE)),),
        ),
        graph="model.onnx",
        precision=Precision.parse("float32"),
        nbytes=1,
    )
    engine = OpenVINO.load(submodel, tmp_path, Options())
    asked = np.array([[3, 0, 49, 3]])
    assert np.array_equal(engine.run({"ids": asked})["y"][0], numpy_helper.to_array(table).astype(np.float32)[asked[0]])
    assert isinstance(engine, OpenVINO) and engine._compiled is not None
    held = {
        tuple(node.get_output_shape(0)): node.get_rt_info()["outputPrecisions"].astype(str)
        for node in engine._compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Const"
    }
    assert held[50, SIZE] == {TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16"}[dtype]
    engine.close()
