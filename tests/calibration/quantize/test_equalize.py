"""Scale migration: the float function stays, quantized outputs come nearer, and what cannot be folded says why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from calibration.observe.ranges import Channels, ChannelStats, collect_ranges, observe
from calibration.quantize.equalize import Fold, equalize, find_folds, folded_scales, folded_stats
from calibration.quantize.plan import LayerPlan, activation_tensors, measured_tensors, plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES, Recipe
from export.checkpoint.tensors import read_header
from export.graph.trace import trace
from export.graph.weights import attach, write
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import InvalidInput, SourceError
from samples.exams import Pictures

Floats = NDArray[np.float32]
Samples = Sequence[Mapping[str, NDArray[Any]]]

WIDTH, INNER, HEADS = 64, 128, 4
INT8, INT4 = RECIPES["int8"], INT4_EVERYWHERE
LENGTH = Dim(name="sequence", min=1, opt=8, max=64)
TOKENS = Tensor(name="tokens", dtype="float32", dims=(BATCH, LENGTH, WIDTH))
SIGNATURE = Signature(inputs=(TOKENS,), outputs=(TOKENS.model_copy(update={"name": "out"}),))


class Attention(nn.Module):
    """A norm, heads of queries and as many or fewer of keys and values, and the product after them."""

    def __init__(self, groups: int = HEADS) -> None:
        super().__init__()
        self.groups, kept = groups, WIDTH // HEADS * groups
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, width) for width in (WIDTH, kept, kept, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        batch, length, _ = y.shape
        q, k, v = (
            layer(y).view(batch, length, heads, WIDTH // HEADS).transpose(1, 2)
            for layer, heads in ((self.q, HEADS), (self.k, self.groups), (self.v, self.groups))
        )
        seen = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups != HEADS)
        return x + self.o(seen.transpose(1, 2).reshape(batch, length, WIDTH))


class Mlp(nn.Module):
    """A norm with a bias, and two products with what a subclass puts between them."""

    inner = INNER

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, self.inner), nn.Linear(INNER, WIDTH)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.between(self.up(self.norm(x))))


class Gelu(Mlp):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


class Geglu(Mlp):
    inner = 2 * INNER

    def between(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class Gated(nn.Module):
    """A norm by root mean square, written out as libraries do, and the MLP of today's language models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up, self.down = (
            nn.Linear(*size, bias=False) for size in ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Outlying(nn.Module):
    """Blocks whose norms and hidden products have a few channels of many times the others' size, as large models do."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                large = torch.randperm(len(parameter))[:3]
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
                    if name.endswith(("up.weight", "v.weight")):
                        parameter[large] *= 4
                else:
                    parameter.copy_(
                        torch.randn(parameter.shape) * 0.2 + (1 if "norm" in name or name.endswith(".weight") else 0)
                    )
                    if "norm" in name or name.endswith("0.weight"):
                        parameter[large] *= 30

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


def attached(module: nn.Module, folder: Path, dtype: torch.dtype = torch.float16) -> ir.Model:
    """The module's graph on the bytes of a checkpoint of this precision."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: value.detach().to(dtype) for name, value in module.named_parameters()}, folder / "checkpoint.safetensors"
    )
    model = trace(module.eval().to("meta"), SIGNATURE)
    refs = read_header(folder / "checkpoint.safetensors")[1]
    attach(model, {name: name for name in refs}, refs)
    return model


def written(model: ir.Model, folder: Path) -> Path:
    write(model, folder)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def calls(count: int = 8, seed: int = 0) -> list[dict[str, Floats]]:
    rng = np.random.default_rng(seed)
    return [{"tokens": rng.standard_normal((2, 60, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(graph: Path, samples: Samples) -> Floats:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=["QDQPropagationTransformer"]
    )
    return np.concatenate([session.run(None, dict(sample))[0].reshape(-1) for sample in samples])


def snr_db(values: Floats, reference: Floats) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(values - reference).sum()))


def measured(
    graph: Path, recipe: Recipe, samples: Samples
) -> tuple[list[LayerPlan], dict[str, ChannelStats], list[Fold]]:
    model = ir.load(graph)
    layers = plan(model, recipe)
    stats = observe(model, (), measured_tensors(model, layers), samples).stats
    return layers, stats, find_folds(model, layers, stats)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LayerNorm, attention": (Attention, 2),
    "LayerNorm, attention of grouped heads": (lambda: Attention(2), 1),
    "plain MLP of ReLU": (Mlp, 2),
    "plain MLP of GELU": (Gelu, 1),
    "GEGLU": (Geglu, 2),
    "RMSNorm, gated MLP": (Gated, 2),
}
"""Blocks, and how many of the tensors that their products read can be scaled."""


@pytest.mark.parametrize("name", BLOCKS)
def test_the_float_function_stays(tmp_path: Path, name: str) -> None:
    """With any scales: those found, and random ones of a factor of a hundred."""
    make, count = BLOCKS[name]
    graph = written(attached(Outlying(make()), tmp_path), tmp_path / "float")
    layers, _, folds = measured(graph, INT8, calls())
    random = arbitrary(ir.load(graph), folds)
    assert len(random) == count
    assert len(folds) == 2 and all(fold.reason for fold in folds if not fold.into)
    model = ir.load(graph)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    reference = run(graph, calls(seed=1))
    for kind, chosen in (("found", folds), ("random", random)):
        copy = equalize(model, chosen)
        assert {layer.node: layer.weight for layer in plan(copy, INT8)} == {
            layer.node: layer.weight for layer in layers
        }
        ratio = snr_db(run(written(copy, tmp_path / kind), calls(seed=1)), reference)
        print(f"{name}, {kind}: {ratio:.0f} dB")
        assert ratio > 105
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before, (
        "the source graph was changed"
    )


def arbitrary(model: ir.Model, folds: Sequence[Fold]) -> list[Fold]:
    """Random scales for all that can be folded, whether or not it gains anything."""
    rng = np.random.default_rng(1)
    return [
        replace(fold, scales=np.exp(rng.uniform(-2.3, 2.3, width(model, fold))).astype(np.float32))
        for fold in folds
        if fold.into
    ]


def width(model: ir.Model, fold: Fold) -> int:
    shape = ir.convenience.create_value_mapping(model.graph)[fold.tensor].shape
    assert shape is not None and isinstance(shape[-1], int)
    return shape[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_precision_costs_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    """What a fold changes is float32, what it does not stays as stored."""
    graph = written(attached(Outlying(Gated()), tmp_path, dtype), tmp_path / "float")
    *_, folds = measured(graph, INT8, calls())
    copy = equalize(ir.load(graph), arbitrary(ir.load(graph), folds))
    kinds = {name: value.dtype for name, value in copy.graph.initializers.items() if name.startswith("blocks")}
    assert kinds.pop("blocks.0.weight.folded") == ir.DataType.FLOAT
    assert set(kinds.values()) == {ir.DataType.FLOAT} and len(kinds) == 3, "all three products were changed"
    assert not any(node.op_type == "Cast" for node in copy.graph)
    assert snr_db(run(written(copy, tmp_path / "out"), calls(seed=1)), run(graph, calls(seed=1))) > 105


def test_a_norm_of_the_standard(tmp_path: Path) -> None:
    """RMSNormalization of opset 23, its scale float16 behind a Cast."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(WIDTH) % 16, 1, 25) * rng.uniform(0.5, 1.5, WIDTH)
    model = normed(scale.astype(np.float16), rng.standard_normal((WIDTH, INNER)).astype(np.float16))
    graph = written(model, tmp_path / "float")
    _, _, (fold,) = measured(graph, INT8, calls())
    assert fold.scales is not None and fold.into == ("scale",)
    assert snr_db(run(written(equalize(ir.load(graph), [fold]), tmp_path / "out"), calls()), run(graph, calls())) > 105


def normed(scale: NDArray[Any], weight: NDArray[Any], seen_too: bool = False) -> ir.Model:
    """RMSNormalization and a MatMul; with `seen_too`, what lies between is an output as well."""
    x = ir.Value(name="tokens", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "length", WIDTH]))
    stored = [ir.tensor(scale, name="scale"), ir.tensor(weight, name="weight")]
    values = [
        ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape.numpy()), const_value=t)
        for t in stored
    ]
    casts = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/Cast") for value in values]
    norm = ir.node("RMSNormalization", [x, casts[0].outputs[0]], {"axis": -1}, name="norm")
    product = ir.node("MatMul", [norm.outputs[0], casts[1].outputs[0]], name="product")
    shapes = [scale.shape, weight.shape, (*["batch", "length"], WIDTH), (*["batch", "length"], weight.shape[1])]
    for node, name, shape in zip(
        [*casts, norm, product], ["scale.float", "weight.float", "x", "out"], shapes, strict=True
    ):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, ir.Shape(shape)
    outputs = [product.outputs[0], *([norm.outputs[0]] if seen_too else [])]
    graph = ir.Graph(
        [x], outputs, nodes=[*casts, norm, product], initializers=values, opset_imports={"": 23}, name="normed"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of blocks, one after another, as a written float graph."""
    folder = tmp_path_factory.mktemp("outlying")
    return written(attached(Outlying(Gated(), Attention(), Geglu(), Mlp()), folder), folder / "float")


def test_smoothquant_helps_int8_activations(outlying: Path, tmp_path: Path) -> None:
    """The same layers each time: those that a plan quantizes with what was folded."""
    *_, folds = measured(outlying, INT8, calls())
    tensors = activation_tensors(ir.load(outlying), INT8)
    layers = plan(
        ir.load(outlying), INT8, collect_ranges(ir.load(outlying), tensors, calls(), scales=folded_scales(folds))
    )
    reference, ratios = run(outlying, calls(seed=1)), {}
    cases: list[tuple[str, list[Fold], Literal["minmax", "auto"]]] = [
        ("naive", [], "minmax"),
        ("clipped", [], "auto"),
        ("smoothed", folds, "auto"),
    ]
    for name, used, method in cases:
        ranges = collect_ranges(ir.load(outlying), tensors, calls(), method, folded_scales(used))
        copy = quantize(equalize(ir.load(outlying), used), layers, ranges)
        ratios[name] = snr_db(run(written(copy, tmp_path / name), calls(seed=1)), reference)
    print("W8A8: " + ", ".join(f"{name} {ratio:.1f} dB" for name, ratio in ratios.items()))
    assert [fold.kind for fold in folds] == ["smoothquant"] * 8 and len(folded_scales(folds)) >= 6
    assert ratios["smoothed"] > max(ratios["naive"], ratios["clipped"]) + 3
    assert all("that int8 activations need" in fold.reason for fold in folds if fold.scales is None)


def test_folds_survive_json(outlying: Path) -> None:
    *_, folds = measured(outlying, INT4, calls())
    again = [Fold.of_record(json.loads(json.dumps(fold.record()))) for fold in folds]
    assert again == folds
    for one, other in zip(folded_scales(folds).values(), folded_scales(again).values(), strict=True):
        assert one.tobytes() == other.tobytes()


def test_awq_helps_int4_weights(outlying: Path, tmp_path: Path) -> None:
    layers, stats, folds = measured(outlying, INT4, calls())
    reference, ratios = run(outlying, calls(seed=1)), {}
    for name, used, informed in (
        ("naive", [], False),
        ("importance", [], True),
        ("awq", folds, False),
        ("both", folds, True),
    ):
        importance = {name: seen.mean_square for name, seen in folded_stats(stats, used).items()} if informed else None
        copy = quantize(equalize(ir.load(outlying), used), layers, importance=importance)
        ratios[name] = snr_db(run(written(copy, tmp_path / name), calls(seed=1)), reference)
    print("int4: " + ", ".join(f"{name} {ratio:.1f} dB" for name, ratio in ratios.items()))
    assert {fold.kind for fold in folds} == {"awq"}
    assert min(ratios["awq"], ratios["importance"]) > ratios["naive"] + 1
    assert ratios["both"] > ratios["naive"] + 2


def test_ranges_by_scales_are_those_of_the_folded_graph(outlying: Path, tmp_path: Path) -> None:
    _, stats, folds = measured(outlying, INT8, calls())
    tensors = activation_tensors(ir.load(outlying), INT8)
    divided = collect_ranges(ir.load(outlying), tensors, calls(), "minmax", folded_scales(folds))
    observed = observe(
        ir.load(written(equalize(ir.load(outlying), folds), tmp_path / "folded")), tensors, list(stats), calls()
    )
    folded, seen = observed.ranges(tensors, "minmax"), observed.stats
    for name in tensors:
        assert divided[name].peak == pytest.approx(folded[name].peak, rel=1e-3)
    for name, figures in folded_stats(stats, folds).items():
        np.testing.assert_allclose(figures.largest, seen[name].largest, rtol=1e-3)
        np.testing.assert_allclose(figures.mean_square, seen[name].mean_square, rtol=1e-3)
        np.testing.assert_allclose(figures.rows, seen[name].rows, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("recipe", [INT8, INT4], ids=lambda recipe: recipe.name)
def test_engines_agree_on_what_was_folded(outlying: Path, tmp_path: Path, recipe: Recipe) -> None:
    openvino = pytest.importorskip("openvino")
    layers, _, folds = measured(outlying, recipe, calls())
    ranges = collect_ranges(
        ir.load(outlying), activation_tensors(ir.load(outlying), recipe), calls(), scales=folded_scales(folds)
    )
    graph = written(quantize(equalize(ir.load(outlying), folds), layers, ranges), tmp_path / "out")
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kernels = {(str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))) for info in infos}
    assert any(kind == "FullyConnected" and precision in ("i4", "i8", "u8") for kind, precision in kernels)
    reference = run(outlying, calls(1))
    ratios = snr_db(run(graph, calls(1)), reference), snr_db(compiled(calls(1)[0])[0].reshape(-1), reference)
    print(
        "{}: ONNX Runtime {:.1f} dB, OpenVINO {:.1f} dB, of {} folds".format(
            recipe.name, *ratios, len(folded_scales(folds))
        )
    )
    assert min(ratios) > 12


def test_weights_are_read_when_written(outlying: Path, tmp_path: Path) -> None:
    *_, folds = measured(outlying, INT8, calls())
    model, reads = ir.load(outlying), []
    for name, value in model.graph.initializers.items():
        if (stored := value.const_value) is not None and name.startswith("blocks") and len(stored.shape) == 2:

            def read(stored: ir.TensorProtocol = stored, name: str = name) -> ir.TensorProtocol:
                reads.append(name)
                return stored

            value.const_value = ir.LazyTensor(read, stored.dtype, ir.Shape(stored.shape.numpy()), name=name)
    copy = equalize(model, folds)
    assert reads == []
    write(copy, tmp_path / "out")
    assert len(reads) == len(set(reads)) == 12, "each weight is read once"


def test_what_cannot_be_folded_says_why(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, INNER)).astype(np.float32)
    stats = {"x": merged(rng, calls=2)}
    reasons = {}

    def reason(model: ir.Model, seen: Mapping[str, ChannelStats] = stats) -> str:
        (fold,) = find_folds(model, plan(model, INT8), seen)
        assert fold.scales is None
        return fold.reason

    ones = np.ones(WIDTH, np.float32)
    reasons["output"] = reason(normed(ones, weight, seen_too=True))
    tied = normed(ones, weight)
    other = ir.node("MatMul", [tied.graph.inputs[0], tied.graph[1].outputs[0]], name="other")
    tied.graph.append(other)
    other.outputs[0].name = "other"
    reasons["tied"] = next(fold.reason for fold in find_folds(tied, plan(tied, INT8), stats) if fold.tensor == "x")
    reasons["zero"] = reason(normed(ones, weight), {"x": replace(stats["x"], largest=np.zeros(WIDTH, np.float32))})
    reasons["one call"] = reason(normed(ones, weight), {"x": replace(stats["x"], parts=())})
    reasons["grouped"] = next(
        fold.reason
        for fold in measured(written(attached(Outlying(Attention(2)), tmp_path), tmp_path / "float"), INT8, calls())[2]
        if not fold.into
    )
    print(reasons)
    assert "output of the graph" in reasons["output"]
    assert reasons["tied"] == "weight weight is used elsewhere too"
    assert reasons["zero"] == "it was always zero"
    assert "single call" in reasons["one call"]
    assert "among several heads" in reasons["grouped"]
    assert find_folds(normed(ones, weight), plan(normed(ones, weight), RECIPES["int8-weight"]), stats) == []


def merged(rng: np.random.Generator, calls: int, sizes: Sequence[Floats] = ()) -> ChannelStats:
    """Statistics of random calls, those of the two halves of sizes of their own."""
    parts = []
    for half in range(2):
        channels = Channels()
        for _ in range(calls):
            rows = (rng.standard_normal((64, WIDTH)) * (sizes[half] if sizes else 1)).astype(np.float32)
            magnitudes = np.abs(rows)
            channels.add(
                len(rows), magnitudes.max(0), magnitudes.sum(0, np.float64), np.square(rows).sum(0, np.float64), rows
            )
        parts.append(channels.stats(64 * calls))
    return ChannelStats.merged(parts)


def test_what_holds_for_some_calls_only_is_not_believed() -> None:
    """Channels that are large in half of the calls: scales from the one half would have the other clipped."""
    rng = np.random.default_rng(0)
    model = normed(np.ones(WIDTH, np.float32), rng.standard_normal((WIDTH, INNER)).astype(np.float32))
    large = np.where(np.arange(WIDTH) < 6, 30, 1).astype(np.float32)
    (steady,) = find_folds(model, plan(model, INT8), {"x": merged(rng, 4, [large, large])})
    (fickle,) = find_folds(model, plan(model, INT8), {"x": merged(rng, 4, [large, large[::-1].copy()])})
    print(
        f"steady {steady.before_db:.1f} -> {steady.after_db:.1f} dB, fickle {fickle.before_db:.1f} -> "
        f"{fickle.after_db:.1f} dB"
    )
    assert steady.scales is not None and steady.after_db > steady.before_db + 6
    assert fickle.scales is None and fickle.after_db < fickle.before_db


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0, 12), st.integers(0, WIDTH), st.sampled_from([INT8, INT4]))
def test_scales_are_usable_whatever_was_seen(seed: int, spread: float, dead: int, recipe: Recipe) -> None:
    """Positive, finite and bounded; 1 for channels that never fired."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((WIDTH, INNER)).astype(np.float32)
    sizes = np.exp(rng.standard_normal(WIDTH) * spread).clip(1e-15, 1e15).astype(np.float32)
    sizes[:dead] = 0
    model = normed(np.ones(WIDTH, np.float32), weight)
    (fold,) = find_folds(model, plan(model, recipe), {"x": merged(rng, 1, [sizes, sizes])})
    if fold.scales is not None:
        assert np.isfinite(fold.scales).all() and fold.scales.min() >= 0.999e-3 and fold.scales.max() <= 1.001e3
        assert (fold.scales[:dead] == 1).all()


def test_foreign_folds_and_damaged_weights_are_refused() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, INNER)).astype(np.float32)
    model = normed(np.ones(WIDTH, np.float32), weight)
    fold = Fold("x", "awq", ("other",), scales=np.ones(WIDTH, np.float32))
    for foreign in (fold, replace(fold, tensor="y", weights=("weight",))):
        with pytest.raises(InvalidInput, match="which this graph lacks"):
            equalize(model, [foreign])
    weight[3, 0] = math.nan
    for recipe in (INT8, INT4):
        with pytest.raises(SourceError, match="'weight' holds NaN"):
            find_folds(model, plan(model, recipe), {"x": merged(rng, 1)})


def test_the_sample_text_encoder(diffusion_bundle: Path, tmp_path: Path) -> None:
    """What each method does for real weights, on prompts that it has not seen."""
    tokenizer = ClipTokenizer(diffusion_bundle / "tokenizer")
    prompts = [
        np.asarray(tokenizer(request.prompt), np.int64).reshape(1, -1)
        for request in islice(Pictures().calibration(5), 0, 192, 2)
    ]
    seen, unseen = ([{"input_ids": ids} for ids in half] for half in (prompts[:48], prompts[48:]))
    graph = diffusion_bundle / "onnx" / "text_encoder" / "model.onnx"
    reference, model, ratios = run(graph, unseen), ir.load(graph), {}
    for recipe in (INT8, INT4):
        layers, stats, folds = measured(graph, recipe, seen)
        tensors = activation_tensors(model, recipe)
        for name, used in (("naive", []), ("folded", folds)):
            ranges = collect_ranges(model, tensors, seen, "auto" if used else "minmax", folded_scales(used))
            importance = (
                {tensor: figures.mean_square for tensor, figures in folded_stats(stats, used).items()} if used else None
            )
            copy = quantize(equalize(model, used), layers, ranges, importance)
            ratios[recipe.name, name] = snr_db(run(written(copy, tmp_path / recipe.name / name), unseen), reference)
    print("text encoder: " + ", ".join(f"{' '.join(key)} {ratio:.2f} dB" for key, ratio in ratios.items()))
    for recipe in (INT8, INT4):
        assert ratios[recipe.name, "folded"] > ratios[recipe.name, "naive"]
