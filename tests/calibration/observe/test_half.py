"""What may compute in half is measured: overflow, noise, what it costs to store; an emulated device rounds at every
node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.observe.half import (
    HEADROOM,
    LEAST_SNR,
    WORTH,
    HalfCompute,
    angles,
    emulate,
    peaks,
    statistics,
    store,
)
from calibration.observe.lean import lean_session
from calibration.observe.ranges import Range
from calibration.quantize.plan import plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import RECIPES
from export.graph.weights import precision, write
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.targets.lowering.half import Half, to_half

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
HALVES: Sequence[Half] = ("float16", "bfloat16")
WIDTH = 64


class Drawing:
    """A graph drawn node by node, from x float32 [batch, WIDTH] to what `done` is given."""

    def __init__(self) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", WIDTH]))
        self.constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> ir.Value:
        tensor = ir.tensor(np.asarray(values, dtype), name=name)
        self.constants.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        )
        return self.constants[-1]

    def __call__(self, op: str, *inputs: ir.Value, name: str = "", **attributes: Any) -> ir.Value:
        made = ir.node(op, inputs, attributes, name=name or f"{op}.{len(self.nodes)}")
        made.outputs[0].name, made.outputs[0].type = f"{made.name}.out", ir.TensorType(FLOAT)
        self.nodes.append(made)
        return made.outputs[0]

    def done(self, output: ir.Value, width: int = WIDTH) -> ir.Model:
        output.shape = ir.Shape(["batch", width])
        graph = ir.Graph(
            [self.x], [output], nodes=self.nodes, initializers=self.constants, opset_imports={"": 23}, name="toy"
        )
        return ir.Model(graph, ir_version=10)


def weights(seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)) * scale / np.sqrt(WIDTH)).astype(np.float32)


def samples(count: int = 4) -> list[dict[str, NDArray[np.float32]]]:
    return [{"x": np.random.default_rng(seed).standard_normal((3, WIDTH)).astype(np.float32)} for seed in range(count)]


def huge() -> ir.Model:
    """A residual stream that reaches 1e5 and more between two norms, as that of the SDXL VAE does."""
    draw = Drawing()
    ones, zeros = draw.constant("ones", np.ones(WIDTH)), draw.constant("zeros", np.zeros(WIDTH))
    first = draw("MatMul", draw.x, draw.constant("w", weights(scale=3e4)), name="first")
    stream = draw("Add", first, draw.x, name="stream")
    shaped = draw("Unsqueeze", stream, draw.constant("axis", [1], np.int64), name="shaped")
    back = draw("Squeeze", shaped, draw.constant("same axis", [1], np.int64), name="back")
    norm = draw("LayerNormalization", back, ones, zeros, name="norm")
    return draw.done(draw("MatMul", norm, draw.constant("v", weights(1)), name="last"))


def rms_norm() -> ir.Model:
    """A norm in single steps, between two products."""
    draw = Drawing()
    first = draw("MatMul", draw.x, draw.constant("w", weights(scale=8.0)), name="first")
    square = draw("Pow", first, draw.constant("two", 2.0), name="square")
    mean = draw("ReduceMean", square, draw.constant("axes", [-1], np.int64), name="mean")
    raised = draw("Add", mean, draw.constant("epsilon", 1e-5), name="raised")
    root = draw("Sqrt", raised, name="root")
    inverse = draw("Reciprocal", root, name="inverse")
    applied = draw("Mul", first, inverse, name="applied")
    return draw.done(draw("MatMul", applied, draw.constant("v", weights(1)), name="last"))


def variance() -> ir.Model:
    """The mean square less the square of the mean, of numbers about 30: nothing is left of it in half."""
    draw = Drawing()
    shifted = draw("Add", draw.x, draw.constant("thirty", 30.0), name="shifted")
    axes = draw.constant("axes", [-1], np.int64)
    square = draw("ReduceMean", draw("Mul", shifted, shifted, name="squared"), axes, name="square")
    mean = draw("ReduceMean", shifted, axes, name="mean")
    found = draw("Sub", square, draw("Mul", mean, mean, name="mean squared"), name="variance")
    return draw.done(draw("Mul", draw.x, found, name="out"))


def rotary() -> ir.Model:
    """The cosine of hundreds of radians, times the input."""
    draw = Drawing()
    position = draw("Mul", draw.x, draw.constant("hundreds", 300.0), name="position")
    angle = draw("Mul", position, draw.constant("frequencies", np.linspace(0.123, 1.377, WIDTH)), name="angle")
    return draw.done(draw("Mul", draw("Cos", angle, name="cosine"), draw.x, name="rotated"))


def saved(model: ir.Model, folder: Path) -> Path:
    write(model, folder / "toy")
    return folder / "toy" / "model.onnx"


def outputs(model: ir.Model) -> NDArray[np.float32]:
    session: Any = lean_session(model)
    return np.concatenate([session.run(None, sample)[0] for sample in samples()])


def snr_db(values: NDArray[Any], reference: NDArray[Any]) -> float:
    exact = reference.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / max(np.sum((values - exact) ** 2), 1e-30)))


def test_what_overflows_is_kept_and_only_that(tmp_path: Path) -> None:
    graph = saved(huge(), tmp_path)
    reference = outputs(ir.load(graph))
    with np.errstate(invalid="ignore"):
        broken = outputs(emulate(to_half(ir.load(graph), "float16")))
    assert not np.isfinite(broken).all(), "the stream was expected to overflow"
    found = HalfCompute.measure(graph, "float16", samples())
    assert found.compute == "float16"
    assert sorted(found.keep) == ["back", "first", "norm", "shaped", "stream"]
    assert "first.out reaches" in found.keep["first"]
    mended = snr_db(outputs(emulate(to_half(ir.load(graph), "float16", found.keep))), reference)
    print(f"kept {len(found.keep)} of 6 nodes: {mended:.1f} dB")
    assert mended == pytest.approx(found.snr_db, abs=0.1)
    assert mended > 55
    assert not HalfCompute.measure(graph, "bfloat16", samples()).keep


def test_peaks_are_those_of_every_tensor() -> None:
    model, given = huge(), samples()
    found = peaks(model, given)
    assert set(found) == {"x"} | {f"{node.name}.out" for node in model.graph}
    assert found["x"] == pytest.approx(max(np.abs(sample["x"]).max() for sample in given))
    assert found["stream.out"] == found["shaped.out"] > 65504 / HEADROOM


def test_statistics_in_single_steps_are_found() -> None:
    assert statistics(rms_norm()) == ["square", "mean", "raised", "root", "inverse", "applied"]
    assert statistics(huge()) == []


@pytest.mark.parametrize(("draw", "gains"), [(rms_norm, False), (variance, True)])
def test_statistics_are_kept_where_they_gain(draw: Callable[[], ir.Model], gains: bool, tmp_path: Path) -> None:
    graph, reference = saved(draw(), tmp_path), outputs(draw())
    found = HalfCompute.measure(graph, "float16", samples())
    alone, kept = (
        snr_db(outputs(emulate(to_half(ir.load(graph), "float16", keep))), reference)
        for keep in ([], statistics(ir.load(graph)))
    )
    print(f"{draw.__name__}: {alone:.1f} dB, statistics kept {kept:.1f} dB")
    assert gains == (kept >= alone + WORTH)
    assert sorted(found.keep) == (sorted(statistics(ir.load(graph))) if gains else [])
    assert found.snr_db == pytest.approx(kept if gains else alone, abs=0.1)
    assert all("statistic: all of them gain" in reason for reason in found.keep.values())


@pytest.mark.parametrize("half", HALVES)
def test_angles_stay_exact(half: Half, tmp_path: Path) -> None:
    model = rotary()
    assert angles(model) == ["position", "angle", "cosine"]
    found = HalfCompute.measure(saved(model, tmp_path), half, samples())
    assert sorted(found.keep) == ["angle", "cosine", "position"]
    lost = snr_db(outputs(emulate(to_half(rotary(), half))), outputs(rotary()))
    print(f"{half}: {lost:.1f} dB, angles kept {found.snr_db:.1f} dB")
    assert found.snr_db > lost + 20


def test_half_that_is_too_noisy_is_not_chosen(tmp_path: Path) -> None:
    """The difference of two numbers that are alike to three digits."""
    draw = Drawing()
    near = draw("Mul", draw.x, draw.constant("near", 1.002), name="near")
    model = draw.done(draw("Sub", near, draw.x, name="difference"))
    found = HalfCompute.measure(saved(model, tmp_path), "bfloat16", samples())
    assert found.compute == "float32" and not found.keep
    assert found.reason.startswith("bfloat16 leaves its outputs") and found.snr_db < 30


def test_quantized_graphs_are_compared_with_their_float_graph(tmp_path: Path) -> None:
    """Rounding to half first changes codes of int8 activations: as far from the float graph as before, elsewhere on the
    way.
    """
    draw = Drawing()
    model = draw.done(draw("MatMul", draw("Tanh", draw.x, name="bent"), draw.constant("w", weights()), name="product"))
    quantized = quantize(model, plan(model, RECIPES["int8"]), {"bent.out": Range(1.0, 40.0)})
    graph = saved(quantized, tmp_path)
    found = HalfCompute.measure(graph, "bfloat16", samples(), model)
    itself = HalfCompute.measure(graph, "bfloat16", samples())
    exact = snr_db(outputs(ir.load(graph)), outputs(model))
    print(f"int8 {exact:.1f} dB, in bfloat16 {found.snr_db:.1f} dB, against itself {itself.snr_db:.1f} dB")
    assert found.compute == "bfloat16"
    assert exact - WORTH < found.snr_db < exact + 0.5


def test_measuring_needs_samples(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="calibrate with more"):
        HalfCompute.measure(saved(huge(), tmp_path), "float16", [])


def test_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'x' NaN or infinite"):
        HalfCompute.measure(saved(huge(), tmp_path), "float16", [{"x": np.full((1, WIDTH), np.nan, np.float32)}])


@pytest.mark.parametrize("half", HALVES)
def test_an_emulated_device_rounds_at_every_node(half: Half) -> None:
    """Against numpy, which rounds after every operation: the same bits."""
    dtype = ir.DataType[half.upper()].numpy()
    draw = Drawing()
    scaled = draw("Mul", draw.x, draw.constant("third", 1 / 3), name="scaled")
    model = draw.done(draw("Add", scaled, draw.x, name="added"))
    x = np.concatenate([sample["x"] for sample in samples()]).astype(dtype)
    expected = (x * np.asarray(1 / 3, dtype) + x).astype(np.float32)
    np.testing.assert_array_equal(outputs(emulate(to_half(model, half))), expected)


def embedding(dtype: Any = np.float32) -> ir.Model:
    """A table that is looked up, a product and a bias, all stored in one type."""
    draw = Drawing()
    floats = dtype == np.float32

    def stored(name: str, values: NDArray[np.float32]) -> ir.Value:
        value = draw.constant(name, values, dtype)
        return value if floats else draw("Cast", value, to=FLOAT, name=f"{name}/Cast")

    rank = draw(
        "Cast",
        draw("Clip", draw.x, draw.constant("low", 0.0), draw.constant("high", 9.0)),
        to=ir.DataType.INT64,
        name="rank",
    )
    rank.type = ir.TensorType(ir.DataType.INT64)
    found = draw("Gather", draw.constant("table", weights(2)[:10, :1], dtype), rank, name="lookup")
    if not floats:
        found.type = ir.TensorType(ir.DataType[np.dtype(dtype).name.upper()])
        found = draw("Cast", found, to=FLOAT, name="lookup/Cast")
    flat = draw("Squeeze", found, draw.constant("axis", [-1], np.int64), name="flat")
    product = draw("MatMul", flat, stored("w", weights()), name="product")
    return draw.done(draw("Add", product, stored("bias", weights(3)[0]), name="out"))


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_stored_in_half(half: Half, dtype: Any, tmp_path: Path) -> None:
    model = embedding(dtype)
    before = ir.to_proto(model).SerializeToString()
    nbytes = write(store(model, half), tmp_path / "half")
    assert ir.to_proto(model).SerializeToString() == before, "the source graph was changed"
    graph = tmp_path / "half" / "model.onnx"
    onnx.checker.check_model(str(graph), full_check=True)
    copy = ir.load(graph)
    kinds = {name: value.dtype for name, value in copy.graph.initializers.items()}
    assert {kinds[name] for name in ("table", "w", "bias")} == {ir.DataType[half.upper()]}
    assert {kinds[name] for name in ("low", "high")} == {FLOAT}, "scalars are exact"
    assert str(precision(copy)) == half
    if dtype == np.float32:
        assert nbytes < 0.55 * write(model.clone(), tmp_path / "float")
    exact = dtype in (np.float32, np.float16) and half == "float16"
    figure = snr_db(outputs(copy), outputs(model))
    print(f"{np.dtype(dtype).name} stored as {half}: {figure:.1f} dB")
    assert figure > (65 if exact else 45)


def test_what_half_cannot_express_and_frequencies_stay(tmp_path: Path) -> None:
    draw = Drawing()
    small = draw("Mul", draw.x, draw.constant("small", np.full(WIDTH, 1e-7)), name="scaled")
    large = draw("Add", small, draw.constant("large", np.linspace(0, 1e5, WIDTH)), name="raised")
    angle = draw("Mul", large, draw.constant("frequencies", np.linspace(0.1, 1, WIDTH)), name="angle")
    model = draw.done(draw("MatMul", draw("Sin", angle, name="sine"), draw.constant("w", weights()), name="last"))
    kinds = {name: value.dtype for name, value in store(model, "float16").graph.initializers.items()}
    assert kinds == {"small": FLOAT, "large": FLOAT, "frequencies": FLOAT, "w": FLOAT16}


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 300.0]), st.sampled_from(HALVES))
def test_kept_everywhere_is_float32(seed: int, scale: float, half: Half) -> None:
    draw = Drawing()
    model = draw.done(
        draw("Tanh", draw("MatMul", draw.x, draw.constant("w", weights(seed, scale)), name="product"), name="out")
    )
    every = [str(node.name) for node in model.graph]
    np.testing.assert_array_equal(outputs(emulate(to_half(model, half, every))), outputs(model))


@pytest.mark.full
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("fixture", ["diffusion_bundle", "vlm_bundle"])
def test_samples_in_half(fixture: str, half: Half, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(fixture)
    for submodel in Bundle(root).manifest.submodels:
        inputs = [submodel.signature.sample(submodel.signature.sample_lengths(), seed) for seed in range(2)]
        found = HalfCompute.measure(root / submodel.graph, half, inputs)
        print(f"{submodel.name}: {found.snr_db:.1f} dB in {half}, {len(found.keep)} nodes kept")
        assert found.compute == half
        assert found.snr_db > (45 if half == "float16" else LEAST_SNR)
