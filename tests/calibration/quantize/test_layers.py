"""Quantized graphs: faithful numbers, the forms engines fuse, clear refusals."""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path

import ml_dtypes
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

from calibration.observe.ranges import Range, collect_ranges
from calibration.quantize.layers import sums
from calibration.quantize.plan import MOST_SPARED, LayerPlan, activation_tensors, plan, spare
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES, recipe
from calibration.quantize.weights import QuantizedWeight, int4_blocks, int8_columns, pack_int4
from export.graph.trace import trace
from export.graph.weights import write
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import InvalidInput, SourceError

"""The toys are small."""
WIDTH = 96
LENGTH = Dim(name="sequence", min=1, opt=4, max=64)
SIGNATURE = Signature(
    inputs=(
        Tensor(name="tokens", dtype="float32", dims=(BATCH, LENGTH, WIDTH)),
        Tensor(name="time", dtype="float32", dims=(BATCH, WIDTH)),
        Tensor(name="picture", dtype="float32", dims=(BATCH, 16, 8, 8)),
    ),
    outputs=(Tensor(name="out", dtype="float32", dims=(BATCH, LENGTH, 128)),),
)


class Toy(nn.Module):
    """Every kind of layer that is quantized: a shared activation, a Gemm, merged rows, convolutions, and one too small
    to matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128, bias=False)
        self.last, self.time = nn.Linear(128, 128), nn.Linear(WIDTH, 128)
        self.conv, self.small = nn.Conv2d(16, 128, 3, padding=1), nn.Conv2d(128, 128, 1, groups=128)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor, picture: torch.Tensor) -> tuple[torch.Tensor]:
        seen = self.small(torch.relu(self.conv(picture))).mean((2, 3))
        mixed = self.first(tokens) * torch.sigmoid(self.second(tokens)) + self.time(time)[:, None] + seen[:, None]
        return (self.last(mixed.reshape(-1, 128)).view(mixed.shape),)


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as a written float graph, its weights in float16 as checkpoints have them."""
    torch.manual_seed(0)
    module = Toy().eval()
    values = {
        name: parameter.detach().numpy().astype(np.float16).astype(np.float32)
        for name, parameter in module.named_parameters()
    }
    model = trace(module.to("meta"), SIGNATURE)
    for name, array in values.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    folder = tmp_path_factory.mktemp("float") / "toy"
    write(model, folder)
    return folder / "model.onnx"


def inputs(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    lengths = {"batch": 2, "sequence": 5}
    return {tensor.name: rng.standard_normal(tensor.shape(lengths)).astype(np.float32) for tensor in SIGNATURE.inputs}


def run_onnxruntime(graph: Path) -> tuple[NDArray[np.float32], collections.Counter[str]]:
    """The output, and the operators that ONNX Runtime made of the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(graph.with_name("optimized.onnx"))
    session = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=["QDQPropagationTransformer"]
    )
    optimized = onnx.load(graph.with_name("optimized.onnx"), load_external_data=False)
    return session.run(None, inputs())[0], collections.Counter(node.op_type for node in optimized.graph.node)


def run_openvino(graph: Path) -> tuple[NDArray[np.float32], collections.Counter[tuple[str, str]]]:
    """The output, and layer types with the precision that OpenVINO runs them in."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return compiled(inputs())[0], collections.Counter(
        (str(i["layerType"].astype(str)), str(i["runtimePrecision"].astype(str))) for i in infos
    )


def snr_db(values: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.sum(reference**2) / max(np.sum((values - reference) ** 2), 1e-30)))


def quantized(floating: Path, name: str, folder: Path, activations: bool = True) -> tuple[Path, dict[str, LayerPlan]]:
    model, chosen = ir.load(floating), INT4_EVERYWHERE if name == "int4" else recipe(name, activations)
    ranges = collect_ranges(model, activation_tensors(model, chosen), [inputs(), inputs(1)])
    write(quantize(model, plan(model, chosen, ranges), ranges), folder / name)
    onnx.checker.check_model(str(folder / name / "model.onnx"), full_check=True)
    return folder / name / "model.onnx", {layer.weight: layer for layer in plan(model, chosen, ranges)}


@pytest.mark.parametrize(
    ("name", "activations", "floor"),
    [("int4", True, 18.0), ("int8-weight", True, 38.0), ("int8", True, 30.0), ("int8", False, 38.0)],
)
def test_engines_run_what_was_quantized(
    floating: Path, tmp_path: Path, name: str, activations: bool, floor: float
) -> None:
    reference, _ = run_onnxruntime(floating)
    graph, layers = quantized(floating, name, tmp_path, activations)
    ours, operators = run_onnxruntime(graph)
    theirs, kernels = run_openvino(graph)
    figures = snr_db(ours, reference), snr_db(theirs, reference), snr_db(theirs, ours)
    print("{}: ONNX Runtime {:.1f} dB, OpenVINO {:.1f} dB, apart {:.1f} dB".format(name, *figures))
    assert snr_db(ours, reference) > floor
    assert snr_db(theirs, reference) > floor
    if name == "int8" and activations:
        assert kernels["Convolution", "u8"] + kernels["Convolution", "i8"] == 1
        assert kernels["FullyConnected", "i8"] + kernels["FullyConnected", "u8"] == 4
        assert operators["MatMulIntegerToFloat"] >= 1
    else:
        assert operators["MatMulNBits"] == 4  # three MatMuls and the Gemm
        assert kernels["FullyConnected", "i4" if name == "int4" else "i8"] >= (3 if name == "int4" else 4)
    assert layers["small.weight"].weight_type == "float"


def test_plan_says_what_and_why(floating: Path) -> None:
    layers = {layer.weight: layer for layer in plan(ir.load(floating), INT4_EVERYWHERE)}
    assert (layers["first.weight"].weight_type, layers["first.weight"].block) == ("int4", 32)
    assert layers["first.weight"].reason == "smaller blocks: 96 inputs are no multiple of 64"
    last = layers["last.weight"]
    assert (last.op, last.weight_type, last.block, last.reason) == ("MatMul", "int4", 64, "")
    assert (layers["conv.weight"].weight_type, layers["conv.weight"].reason) == (
        "int8",
        "convolutions without int8 inputs, or in groups, have no form in 4 bits",
    )
    assert layers["small.weight"].reason == "too few elements: 128"
    assert (layers["time.weight"].op, layers["time.weight"].weight_type) == ("Gemm", "int8")


@pytest.mark.parametrize(
    ("rows", "columns", "reason"),
    [(72, 128, "72 inputs are no multiple of 32"), (64, 129, "129 outputs are an odd number")],
)
def test_what_int4_does_not_fit_is_int8_and_said(rows: int, columns: int, reason: str) -> None:
    (layer,) = plan(matmul(np.ones((rows, columns), np.float32)), INT4_EVERYWHERE)
    assert (layer.weight_type, layer.block, layer.reason) == ("int8", 0, f"does not divide into blocks: {reason}")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_all_layers_of_a_tiny_model_may_be_small(name: str) -> None:
    """What is little of a large model may be all of a small one, which is quantized all the same."""
    (layer,) = plan(matmul(np.ones((64, 8), np.float32)), replace(RECIPES[name], spare_last=False))
    assert (layer.weight_type, layer.reason) == (name, "")


def test_int4_is_for_weights_worth_it(floating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.quantize.plan.SMALL_SHARE_INT4", 1)  # as if there were much more than these
    layers = {layer.weight: layer for layer in plan(ir.load(floating), RECIPES["int4"])}
    assert layers["first.weight"].weight_type == "int8"
    assert (
        layers["first.weight"].reason
        == f"too few elements: 4 bits would save only {layers['first.weight'].elements // 2} bytes"
    )


def test_what_makes_the_output_is_int8_at_int4(floating: Path) -> None:
    chosen = replace(INT4_EVERYWHERE, spare_last=True)
    layers = {layer.weight: layer for layer in plan(ir.load(floating), chosen)}
    spared = {name for name, layer in layers.items() if layer.reason.startswith("makes the output")}
    assert spared == {"last.weight"} and layers["last.weight"].weight_type == "int8"
    assert layers["first.weight"].weight_type == "int4"


def test_the_few_weights_that_int4_harms_most_are_int8() -> None:
    """The worst first, none above the limit, and no more than their share of the elements."""
    sizes = {"a": 20, "b": 20, "c": 20, "d": 10, "e": 4000}
    layers = [LayerPlan(name, "MatMul", name, elements, "int4", 64, False) for name, elements in sizes.items()]
    layers.append(LayerPlan("f", "MatMul", "f", 20, "int8", 0, False, "before"))
    budget = MOST_SPARED * sum(sizes.values())
    found = {layer.weight: layer for layer in spare(layers, {"a": 25.0, "b": 35.0, "c": 20.0, "e": 10.0, "f": 5.0})}
    assert [name for name, layer in found.items() if layer.weight_type == "int8"] == [
        "a",
        "c",
        "f",
    ]  # b is good enough, e too large
    assert (
        found["c"].block == 0
        and found["c"].reason == "sensitive: int4 would leave its output 20.0 dB"
        and found["f"].reason == "before"
    )
    tight = spare(layers, {name: 20.0 + number for number, name in enumerate(sizes)})
    assert sum(layer.elements for layer in tight[:5] if layer.weight_type == "int8") <= budget
    assert spare(layers, {}) == layers


def test_noisy_activations_stay_float(floating: Path) -> None:
    model, chosen = ir.load(floating), RECIPES["int8"]
    tensors = activation_tensors(model, chosen)
    noisy = {name: Range(1.0, 40.0) for name in tensors} | {"tokens": Range(1.0, 10.0)}
    layers = {layer.weight: layer for layer in plan(model, chosen, noisy)}
    assert not layers["first.weight"].activation
    assert "10.0 dB" in layers["first.weight"].reason
    assert layers["last.weight"].activation
    copy = quantize(model, plan(model, chosen, noisy), noisy)
    assert sum(node.op_type == "QuantizeLinear" for node in copy.graph) == len(tensors) - 1


def test_noise_that_drowns_in_a_sum_is_allowed(floating: Path) -> None:
    model, chosen = ir.load(floating), RECIPES["int8"]
    ranges = {name: Range(1.0, 30.0) for name in activation_tensors(model, chosen)}
    node = next(layer.node for layer in plan(model, chosen) if layer.weight == "last.weight")
    for dilution, allowed in ((9.0, False), (11.0, True)):
        planned = {layer.node: layer for layer in plan(model, chosen, ranges, {node: dilution})}
        assert planned.pop(node).activation == allowed
        assert not any(layer.activation for layer in planned.values())


class Residual(nn.Module):
    """x + bias-added product, a sum that is broadcast, and a product that nothing is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.added, self.spread, self.alone = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor, picture: torch.Tensor) -> tuple[torch.Tensor]:
        stream = tokens + self.added(torch.tanh(tokens))
        return (self.alone(self.spread(stream) + time[:, None]) * picture.mean(),)


def test_sums_are_found() -> None:
    model = trace(Residual().to("meta"), SIGNATURE)
    found, weights = sums(model), {layer.node: layer.weight for layer in plan(model, RECIPES["int8"])}
    assert [weights[node] for node in found] == ["added.weight"], "no bias, no broadcast sum, no product alone"
    added, total = next(iter(found.values()))
    assert added != total


def test_one_quantizer_serves_all_consumers(floating: Path) -> None:
    model, chosen = ir.load(floating), RECIPES["int8"]
    ranges = {name: Range(1.0, 40.0) for name in activation_tensors(model, chosen)}
    copy = quantize(model, plan(model, chosen, ranges), ranges)
    assert sum(node.op_type == "QuantizeLinear" and node.inputs[0].name == "tokens" for node in copy.graph) == 1
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph), "the source graph was changed"


def test_a_changed_plan_is_what_is_done(floating: Path, tmp_path: Path) -> None:
    model = ir.load(floating)
    layers = [
        replace(layer, weight_type="float") if layer.weight != "last.weight" else layer
        for layer in plan(model, INT4_EVERYWHERE)
    ]
    copy = quantize(model, layers)
    assert [name for name in copy.graph.initializers if name.endswith(".int4")] == ["last.weight.int4"]


def test_missing_ranges_are_named(floating: Path) -> None:
    with pytest.raises(InvalidInput, match="tokens"):
        quantize(ir.load(floating), plan(ir.load(floating), RECIPES["int8"]), {})


def test_a_submodel_may_ask_for_more_bits() -> None:
    assert recipe("int4", least_bits=8) == RECIPES["int8"]
    assert recipe("int4", activations=False, least_bits=8) == RECIPES["int8-weight"]
    assert recipe("int4", activations=False) == replace(RECIPES["int4"], activations=False)
    assert recipe("int8", least_bits=8) == RECIPES["int8"] and recipe("int4") == RECIPES["int4"]


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'int8'"):
        recipe("int88")


@pytest.mark.parametrize("name", ["int4", "int8-weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, bad: float) -> None:
    weights = np.ones((128, 64), np.float32)
    weights[77, 3] = bad
    with pytest.raises(SourceError, match="'w' holds NaN"):
        model = matmul(weights)
        write(quantize(model, plan(model, INT4_EVERYWHERE if name == "int4" else RECIPES[name])), tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_stored_precisions_and_orders_agree(dtype: type) -> None:
    """A linear layer's [N, K] and its transpose [K, N], in each precision of checkpoints, give the same codes."""
    stored = np.random.default_rng(0).standard_normal((70, 192)).astype(dtype)
    for block in (0, 64):
        one = QuantizedWeight(ir.tensor(stored, name="w"), transposed=True, block=block)
        other = QuantizedWeight(ir.tensor(np.ascontiguousarray(stored.T), name="w"), transposed=False, block=block)
        assert one.codes().tobytes() == other.codes().tobytes()
        assert one.scales().tobytes() == other.scales().tobytes()
    assert one.scales().shape == (3, 70)


def test_scales_alone_are_those_of_the_codes() -> None:
    weight = QuantizedWeight(
        ir.tensor(np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32), name="w"), False, 32
    )
    weight.codes()
    beside = weight.scales().tobytes()
    assert weight.scales().tobytes() == beside


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]), st.integers(1, 5), st.integers(1, 9))
def test_errors_are_bounded(seed: int, magnitude: float, blocks: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(3, (32 * blocks, columns)) * magnitude).astype(np.float32)
    codes, scales = int8_columns(weights)
    assert np.all(np.abs(codes * scales - weights) <= scales * 0.5001)
    codes, half = int4_blocks(weights, 32)
    wide = np.repeat(half.astype(np.float32), 32, axis=0)
    naive = np.abs(weights.reshape(blocks, 32, columns)).max(axis=1).repeat(32, axis=0) / 7
    assert codes.min() >= -8
    assert codes.max() <= 7
    error = np.square(codes * wide - weights).sum()
    rounded = np.square(np.rint(weights / naive) * naive - weights).sum()
    # float16 cannot express a scale below 6e-8 finely: the bound holds where it can
    assert magnitude < 1e-3 or error <= rounded * 1.01 + 1e-12


def test_zero_and_constant_channels() -> None:
    weights = np.zeros((64, 3), np.float32)
    weights[:, 1] = -0.7
    for codes, scales in (int8_columns(weights), int4_blocks(weights, 64)):
        restored = codes * scales.astype(np.float32).reshape(1, 3)
        assert np.all(scales > 0)
        np.testing.assert_allclose(restored, weights, rtol=1e-3)


def test_packing_is_that_of_onnx() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 10)).astype(np.int8)
    assert pack_int4(codes).tobytes() == ir.tensor(codes.astype(ml_dtypes.int4)).tobytes()


def test_shared_weight_is_stored_once() -> None:
    model = matmul(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), twice=True)
    copy = quantize(model, plan(model, INT4_EVERYWHERE))
    assert sorted(copy.graph.initializers) == ["w.int4", "w.int4.scale"]


def matmul(weights: NDArray[np.float32], twice: bool = False) -> ir.Model:
    rows, columns = weights.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", rows]))
    w = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(weights.shape),
        const_value=ir.tensor(weights, name="w"),
    )
    nodes = [ir.node("MatMul", [x, w], name="one")]
    if twice:
        nodes.append(ir.node("MatMul", [nodes[0].outputs[0], w], name="two"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = (
            f"{node.name}.out",
            ir.DataType.FLOAT,
            ir.Shape(["batch", columns]),
        )
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=[w], opset_imports={"": 23}, name="matmul")
    return ir.Model(graph, ir_version=10)
