"""int4 nested in int8: what is stored is what runs, in int8 kernels, on every target that can be tried here."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from calibration.observe.ranges import collect_ranges
from calibration.quantize.plan import activation_tensors, plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import RECIPES
from calibration.quantize.weights import pack_int4
from export.graph.trace import trace
from export.graph.weights import precision, write
from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.engine import Compiled, Options, target
from runtime.errors import EngineError, EngineUnavailable
from runtime.targets.lowering.nested import Stored, int8_codes, widen
from runtime.targets.onnxruntime.engine import ONNXRuntime
from runtime.targets.openvino.engine import OpenVINO
from runtime.targets.sessions.sessions import DISABLED, FOLDER, nested_values
from runtime.targets.sessions.stored import read_plan

SIDE = Dim(name="side", min=4, opt=12, max=32)
SIGNATURE = Signature(
    inputs=(Tensor(name="picture", dtype="float32", dims=(BATCH, 32, SIDE, SIDE)),),
    outputs=(Tensor(name="out", dtype="float32", dims=(BATCH, 1, 64)),),
)


class Toy(nn.Module):
    """Convolutions of two kernel sizes, one with a stride, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.Conv2d(64, 64, 1),
        )
        self.product, self.last = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor]:
        seen = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(picture))))))
        rows = seen.flatten(2).transpose(1, 2)
        return (self.last(torch.relu(self.product(rows.mean(1)[:, None]))),)


def inputs(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    return {"picture": np.random.default_rng(seed).standard_normal((2, 32, 12, 12)).astype(np.float32)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Submodel, NDArray[np.float32]]:
    """A folder as a bundle has it, and what the float model gives."""
    torch.manual_seed(0)
    module = Toy().eval()
    with torch.no_grad():
        wanted = module(torch.from_numpy(inputs()["picture"]))[0].numpy()
    values = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    model = trace(module.to("meta"), SIGNATURE)
    for name, array in values.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    ranges = collect_ranges(model, activation_tensors(model, RECIPES["int4"]), [inputs(1), inputs(2)])
    made = quantize(model, plan(model, RECIPES["int4"], ranges), ranges)
    root = tmp_path_factory.mktemp("nested")
    nbytes = write(made, root / "toy")
    write(quantize(model, plan(model, RECIPES["int8"], ranges), ranges), root / "int8")
    onnx.checker.check_model(str(root / "toy" / "model.onnx"), full_check=True)
    return (
        root,
        Submodel(name="toy", signature=SIGNATURE, graph="toy/model.onnx", precision=precision(made), nbytes=nbytes),
        wanted,
    )


def snr_db(values: NDArray[Any], reference: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.sum(reference**2) / max(np.sum((values - reference) ** 2), 1e-30)))


def canonical(root: Path) -> NDArray[np.float32]:
    """What the stored graph gives as it stands."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(root / "toy" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, inputs())[0])


def optimized(
    graph: Path, weights: Path, folder: Path, made: Mapping[str, Any] | None = None
) -> collections.Counter[str]:
    """The operators that ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry(FOLDER, str(weights))
    options.add_external_initializers(list(made or {}), list((made or {}).values()))
    onnxruntime.InferenceSession(graph.read_bytes(), options, ["CPUExecutionProvider"], disabled_optimizers=DISABLED)
    return collections.Counter(
        node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    )


def test_four_bits_are_stored(bundle: tuple[Path, Submodel, NDArray[np.float32]]) -> None:
    root, submodel, wanted = bundle
    assert str(submodel.precision) == "int4 + int8 W4A8", "what makes the output is int8"
    model = ir.load(root / "toy" / "model.onnx")
    nested = {name: value for name, value in model.graph.initializers.items() if name.endswith(".int4.nested")}
    assert sorted(nested) == [f"{name}.weight.int4.nested" for name in ("first", "product", "second", "third")]
    assert all(value.dtype == ir.DataType.INT4 for value in nested.values())
    assert snr_db(canonical(root), wanted) > 15


def test_engines_run_int8_kernels(bundle: tuple[Path, Submodel, NDArray[np.float32]], tmp_path: Path) -> None:
    root, submodel, _ = bundle
    ONNXRuntime.compile(submodel, root / submodel.graph, root / "engines" / "onnxruntime")
    for products in ("integers", "floats"):
        engine = ONNXRuntime.load(submodel, root, Options(settings={"products": products}))
        assert snr_db(engine.run(inputs())["out"], canonical(root)) > 35, products
    engines, int8 = (
        root / "engines" / "onnxruntime",
        submodel.model_copy(update={"precision": Precision.parse("int8 W8A8")}),
    )
    ONNXRuntime.compile(int8, root / "int8" / "model.onnx", tmp_path)
    made = nested_values(read_plan(engines, "toy"), root / "toy" / "weights.safetensors")
    operators = optimized(engines / "toy.onnx", root / "toy", tmp_path, made)
    assert (
        operators == optimized(tmp_path / "toy.onnx", root / "int8", tmp_path) and operators["MatMulIntegerToFloat"] > 5
    )
    assert len(list(engines.glob("*.safetensors"))) == 0, "int8 weights are made when it is loaded"
    pytest.importorskip("openvino")
    other = OpenVINO.load(submodel, root, Options())
    assert snr_db(other.run(inputs())["out"], canonical(root)) > 35
    infos = [node.get_rt_info() for node in other._request.get_compiled_model().get_runtime_model().get_ops()]  # type: ignore[attr-defined]
    kernels = collections.Counter((i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in infos)
    assert kernels["Convolution", "u8"] + kernels["Convolution", "i8"] == 3
    assert kernels["FullyConnected", "u8"] + kernels["FullyConnected", "i8"] == 2


@pytest.mark.parametrize("name", ["cuda", "directml", "coreml", "tensorrt-rtx"])
def test_other_targets_compile_it(
    bundle: tuple[Path, Submodel, NDArray[np.float32]], name: str, tmp_path: Path
) -> None:
    """And compute what the canonical graph says where something here can stand for their devices."""
    root, submodel, _ = bundle
    engine = target(name)
    found = engine.available()
    if not (found.usable or found.compiles):
        pytest.skip(found.reason)
    folder = root / "engines" / name
    artifact = engine.compile(submodel, root / submodel.graph, folder)
    try:
        emulated = engine.emulate(submodel, root, Options(compiled=Compiled(artifact, folder)))
    except EngineUnavailable as error:
        pytest.skip(str(error))
    one = {"picture": inputs()["picture"][:1]}
    expected = canonical(root)[:1]
    assert snr_db(emulated.run(one)["out"], expected) > 30


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(64, 6), (6, 8, 3, 3), (4, 96, 1), (2, 32, 1, 1)]))
def test_int8_codes_are_codes_times_factors(seed: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    product, rows = len(shape) == 2, int(np.prod(shape[1:]))
    block = 32 if product or rows % 32 == 0 else 24
    codes = rng.integers(-8, 8, (shape[0], rows)).astype(np.int8)
    factors = rng.integers(1, 16, (shape[0] // block, shape[1]) if product else (shape[0], rows // block)).astype(
        np.uint8
    )
    wide = codes.astype(int) * np.repeat(factors.astype(int), block, axis=0 if product else 1)
    np.testing.assert_array_equal(int8_codes(pack_int4(codes), factors, shape), wide.reshape(shape))


def test_widening_leaves_other_graphs_alone(bundle: tuple[Path, Submodel, NDArray[np.float32]]) -> None:
    model = ir.load(bundle[0] / "toy" / "model.onnx")
    assert len(widen(model)) == 4 and widen(model) == {}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(EngineError, match=r"weights\.safetensors: 'w\.factors' cannot be read"):
        Stored(tmp_path / "weights.safetensors").int8("w", (2, 32))
    with pytest.raises(EngineError, match="could not load"):
        Stored(tmp_path / "none.safetensors")
