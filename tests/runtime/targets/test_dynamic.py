"""Inputs of layers with quantized weights are rounded to 8 bits where the bundle allows it, nowhere else, and the
engine says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import Options, Slot, targets
from runtime.targets.onnxruntime import engine as ort
from runtime.targets.openvino.engine import OpenVINO

ROWS = Dim(name="rows", min=1, opt=8, max=64)
INPUTS, OUTPUTS, BLOCK = 192, 48, 64
SAYS = "with dynamic 8-bit activations"


@pytest.fixture(params=["onnxruntime", "openvino"])
def target(request: pytest.FixtureRequest) -> str:
    found = targets()[request.param].available()
    if not found.usable:
        pytest.skip(found.reason)
    return str(request.param)


def layer(folder: Path, bits: int, block: int = BLOCK) -> tuple[Submodel, Array]:
    """One layer in the canonical form of its bits, and the weights [INPUTS, OUTPUTS] that it stands for."""
    rng = np.random.default_rng(bits)
    rows, peak = (INPUTS // block, 7) if bits == 4 else (1, 127)
    codes = rng.integers(-peak, peak + 1, (INPUTS, OUTPUTS), np.int8)
    scales = rng.uniform(0.01, 0.02, (rows, OUTPUTS)).astype(np.float16).astype(np.float32)
    if bits == 4:
        nodes = [
            helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("DequantizeLinear", ["codes", "wide"], ["weight"], axis=0, block_size=block),
        ]
        low, high = codes.ravel()[::2] & 15, codes.ravel()[1::2] & 15
        stored = helper.make_tensor(
            "codes", TensorProto.INT4, codes.shape, (low | high << 4).astype(np.uint8).tobytes(), raw=True
        )
        tensors = [stored, numpy_helper.from_array(scales.astype(np.float16), "scales")]
    else:
        nodes = [helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=1)]
        tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales[0], "scales")]
    nodes.append(helper.make_node("MatMul", ["x", "weight"], ["y"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", INPUTS), ("y", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), folder / "model.onnx"
    )
    x, y = (Tensor(name=name, dtype="float32", dims=(ROWS, size)) for name, size in (("x", INPUTS), ("y", OUTPUTS)))
    signature = Signature(inputs=(x,), outputs=(y,))
    submodel = Submodel(
        name="layer", signature=signature, graph="model.onnx", precision=Precision.parse(f"int{bits}"), nbytes=0
    )
    return submodel, np.repeat(scales, INPUTS // rows, axis=0) * codes


def noise_db(
    target: str, submodel: Submodel, folder: Path, weight: Any, rows: int, **settings: str
) -> tuple[float, str]:
    """Signal to noise ratio of the engine's product in dB, and its device."""
    engine = targets()[target].load(submodel, folder, Options(threads=1, settings=settings))
    x = np.random.default_rng(rows).standard_normal((rows, INPUTS)).astype(np.float32)
    exact = x.astype(np.float64) @ weight
    noise = engine.run({"x": x})["y"] - exact
    engine.close()
    return float(10 * np.log10((exact**2).sum() / (noise**2).sum())), engine.device


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bundle_decides_whether_inputs_are_rounded(target: str, tmp_path: Path, bits: int, rows: int) -> None:
    submodel, weight = layer(tmp_path, bits)
    exact, device = noise_db(target, submodel, tmp_path, weight, rows)
    assert exact > 100 and SAYS not in device, (
        "a bundle that does not allow it gets float32, whatever the SDK would do by itself"
    )
    rounded, device = noise_db(target, submodel.model_copy(update={"dynamic": True}), tmp_path, weight, rows)
    assert SAYS in device, "every processor that this project is tested on can"
    assert 35 < rounded < 60, "8 bits with a scale for 32 or 64 inputs leave some 45 dB"


def test_settings_decide_over_the_bundle(target: str, tmp_path: Path) -> None:
    submodel, weight = layer(tmp_path, 4)
    off = {"onnxruntime": {ort.ACCURACY: "0"}, "openvino": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}[target]
    exact, device = noise_db(target, submodel.model_copy(update={"dynamic": True}), tmp_path, weight, 4, **off)
    assert exact > 100 and SAYS not in device


def test_a_model_without_quantized_weights_has_nothing_to_round(vlm_bundle: Path) -> None:
    bundle = Bundle(vlm_bundle)
    for name in ("decoder", "token_embedding"):
        submodel = bundle.submodel(name).model_copy(update={"dynamic": True})
        assert SAYS not in targets()["openvino"].load(submodel, bundle.root, Options(threads=1)).device


def test_a_cache_of_8_bits_is_near_and_can_be_trimmed(vlm_bundle: Path) -> None:
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("decoder")
    *_, hidden = submodel.signature.inputs[0].dims
    assert isinstance(hidden, int)
    embeds = np.random.default_rng(0).standard_normal((1, 30, hidden), np.float32)

    def logits(settings: dict[str, str]) -> list[Array]:
        engine: Any = targets()["openvino"].load(submodel, bundle.root, Options(threads=1, settings=settings))
        slot, found = Slot(), []
        for start, stop in ((0, 20), (20, 21), (10, 30)):
            engine.trim(slot, start)
            inputs = {
                "inputs_embeds": embeds[:, start:stop],
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
            }
            found.append(engine.run(inputs, slot)["logits"])
        return found

    pairs: list[tuple[Any, Any]] = list(zip(logits({"KV_CACHE_PRECISION": "u8"}), logits({}), strict=True))
    errors = [np.abs(near - exact).max() / np.abs(exact).max() for near, exact in pairs]
    assert max(errors) < 0.03 and errors[1] > 0, "a first call reads no cache, the others do"


def test_the_probe_is_a_model_of_the_standard() -> None:
    for bits in (4, 8):
        model = onnx.load_from_string(ort._product_of_ones(bits))
        onnx.checker.check_model(model)
        session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=[ort.PROVIDER])
        powers = np.exp2(-np.arange(32, dtype=np.float32))[None]
        assert session.run(None, {"x": powers})[0] == pytest.approx(2.0, rel=0.02)


def test_quantized_activations_run_at_fixed_shapes(tmp_path: Path) -> None:
    """Each shape is compiled when it first comes, the two last used are kept, and all give what the open
    shape gives.
    """
    if not targets()["openvino"].available().usable:
        pytest.skip(targets()["openvino"].available().reason)
    submodel, _ = layer(tmp_path, 8)
    engines = {
        precision: OpenVINO.load(
            submodel.model_copy(update={"precision": Precision.parse(precision)}), tmp_path, Options()
        )
        for precision in ("int8", "int8 W8A8")
    }
    fixed = engines["int8 W8A8"]
    assert isinstance(fixed, OpenVINO)
    rng = np.random.default_rng(0)
    for rows, kept in ((8, [8]), (3, [8, 3]), (8, [3, 8]), (5, [8, 5]), (3, [5, 3])):
        x = {"x": rng.standard_normal((rows, INPUTS)).astype(np.float32)}
        np.testing.assert_allclose(fixed.run(x)["y"], engines["int8"].run(x)["y"], rtol=1e-4, atol=1e-4)
        assert [dict(one.shapes)["x"][0] for one in fixed._fixed] == kept
