"""nf4: the nearest of 16 values, graphs that compute codes times scales, and OpenVINO, which keeps the codes as they
are.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from calibration.observe.lean import lean_session
from calibration.quantize.forms import restored
from calibration.quantize.nf4 import nf4_blocks
from calibration.quantize.plan import plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import RECIPES
from calibration.quantize.weights import int4_blocks
from export.graph.weights import precision, write
from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Dim, Signature, Tensor
from runtime.engine import Options
from runtime.errors import EngineError, SourceError
from runtime.targets.lowering.nf4 import CODES, VALUES
from runtime.targets.openvino.engine import OpenVINO
from tests.calibration.quantize.test_float8 import INPUTS, OUTPUTS, samples, two_layers


def weights(rows: int = 128, columns: int = 48, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * np.float32(0.02)


def expanded(codes: Any, scales: Any, block: int) -> Any:
    return VALUES[codes] * np.repeat(scales.astype(np.float32), block, axis=0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64]), st.floats(-12, 4))
def test_codes_are_those_of_the_nearest_values(seed: int, block: int, power: float) -> None:
    given_ = weights(seed=seed) * np.float32(10.0**power)
    codes, scales = nf4_blocks(given_, block)
    wide = np.repeat(scales.astype(np.float32), block, axis=0)
    found = np.abs(VALUES[codes] * wide - given_)
    least = np.abs(VALUES[:, None, None] * wide - given_).min(axis=0)
    assert codes.dtype == np.int8 and codes.min() >= 0 and codes.max() <= 15
    assert (found <= least + wide * 2.0**-10).all()  # ties are decided in float16


def test_zeros_stay_zeros_and_extremes_keep_their_signs() -> None:
    given_ = np.zeros((64, 2), np.float32)
    given_[3, 1], given_[9, 1] = 2.0, -2.0
    codes, scales = nf4_blocks(given_, 64)
    np.testing.assert_array_equal(expanded(codes, scales, 64), given_)


def test_normal_weights_lose_less_than_in_int4() -> None:
    given_ = weights(1024, 64)
    nf4, codes4 = nf4_blocks(given_, 64), int4_blocks(given_, 64)
    errors = [
        float(np.square(one - given_).sum())
        for one in (expanded(*nf4, 64), codes4[0] * np.repeat(codes4[1].astype(np.float32), 64, axis=0))
    ]
    assert errors[0] < 0.87 * errors[1]  # 0.6 dB


def test_inputs_that_matter_lose_less() -> None:
    given_, importance = weights(), np.linspace(0.01, 4, 128).astype(np.float32) ** 2
    errors = [
        float((importance[:, None] * np.square(expanded(*nf4_blocks(given_, 64, one), 64) - given_)).sum())
        for one in (importance, None)
    ]
    assert errors[0] < errors[1]


def quantized() -> ir.Model:
    model = two_layers()
    return quantize(model, plan(model, RECIPES["nf4"]))


def exact() -> Any:
    """What the graph says, computed apart from it."""
    model = two_layers()
    layers = plan(model, RECIPES["nf4"])
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    x = samples()
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    for planned in layers:
        x = x @ restored(arrays[planned.weight].astype(np.float32), planned, None)
    return x


def test_graphs_compute_codes_times_scales(tmp_path: Path) -> None:
    model = quantized()
    assert [planned.weight_type for planned in plan(two_layers(), RECIPES["nf4"])] == ["nf4", "int8"]
    write(model, tmp_path / "graph")
    assert set(precision(model).weights) >= {"int8", "nf4"}
    session: Any = lean_session(model)
    np.testing.assert_allclose(session.run(None, {"x": samples()})[0], exact(), rtol=1e-4, atol=1e-4)
    loaded = onnx.load(tmp_path / "graph/model.onnx")
    reference = ReferenceEvaluator(loaded).run(None, {"x": samples()})
    np.testing.assert_allclose(reference[0], exact(), rtol=1e-4, atol=1e-4)


def submodel(model: ir.Model) -> Submodel:
    rows = Dim(name="batch", min=1, opt=16, max=64)
    (x,), (y,) = (
        [Tensor(name=str(value.name), dtype="float32", dims=(rows, INPUTS)) for value in values]
        for values in (model.graph.inputs, model.graph.outputs)
    )
    signature = Signature(inputs=(x,), outputs=(y,))
    return Submodel(name="two", signature=signature, graph="graph/model.onnx", precision=precision(model), nbytes=0)


def test_openvino_multiplies_the_codes(tmp_path: Path) -> None:
    model = quantized()
    write(model, tmp_path / "graph")
    engine = OpenVINO.load(submodel(model), tmp_path, Options())
    gc.collect()
    for _ in range(2):
        (found,) = engine.run({"x": samples()}).values()
        noise = np.square(found - exact()).sum() / np.square(exact()).sum()
        assert noise < 1e-4  # inputs of the int8 layer may be rounded to 8 bits
    layers = [node.get_rt_info() for node in engine._compiled.get_runtime_model().get_ops()]  # type: ignore[attr-defined]
    assert "nf4" in {one["runtimePrecision"].astype(str) for one in layers}
    engine.close()


def test_files_without_the_codes_are_refused(tmp_path: Path) -> None:
    model = quantized()
    write(model, tmp_path / "graph")
    file = tmp_path / "graph/weights.safetensors"
    file.write_bytes(file.read_bytes().replace(f'{CODES}"'.encode(), b'.nf5"'))
    with pytest.raises(EngineError, match=r"first\.weight\.nf4' cannot be read .* Build the bundle again"):
        OpenVINO.load(submodel(model), tmp_path, Options())


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = two_layers()
    value = model.graph.initializers["first.weight"]
    value.const_value = ir.tensor(np.full((INPUTS, OUTPUTS), 7e4, np.float32), name="first.weight")
    with pytest.raises(SourceError, match=r"magnitude above 6\.55e\+04"):
        write(quantize(model, plan(model, RECIPES["nf4"])), tmp_path / "graph")
