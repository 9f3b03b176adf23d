"""GPTQ: never worse than rounding on what it saw, better on what it did not, and the same where there is nothing to
make up for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibration.observe.windows
from calibration.observe.hessians import Hessian
from calibration.quantize.codes import read_codes, read_records
from calibration.quantize.equalize import Fold
from calibration.quantize.gptq import DAMPING, Factor, compensate, compensated, factor
from calibration.quantize.plan import plan
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES
from calibration.quantize.weights import Floats, int4_blocks, nested_blocks, unpack_int4
from runtime.errors import InvalidInput, SourceError

Array = NDArray[np.float32]


def rows(count: int, channels: int, seed: int, hidden: int = 0) -> Floats:
    """Rows of correlated channels: `hidden` causes (by default half as many as channels), and a little noise of each
    channel's own.
    """
    mix = np.random.default_rng(99).standard_normal((hidden or channels // 2, channels))
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, len(mix))) @ mix + 0.2 * rng.standard_normal((count, channels))).astype(
        np.float32
    )


def hessian(inputs: Floats) -> Hessian:
    return Hessian(inputs.T @ inputs, len(inputs))


def restored(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> Floats:
    block = len(codes) // len(scales)
    return np.multiply(codes, np.repeat(scales.astype(np.float32), block, axis=0), dtype=np.float32)


def output_error(
    inputs: Floats, weights: Floats, form: tuple[NDArray[np.int8], NDArray[np.float16]]
) -> NDArray[np.float64]:
    """Squared error of each output over all rows."""
    return np.asarray(np.square((inputs @ (restored(*form) - weights)).astype(np.float64)).sum(axis=0))


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 8),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_no_weight_is_worse_than_rounded_on_the_rows_seen(
    seed: int, blocks: int, count: int, columns: int, size: float
) -> None:
    """Whether there are fewer rows than channels or more."""
    rng = np.random.default_rng(seed)
    inputs = rows(count, 32 * blocks, seed)
    weights = (rng.standard_t(3, (32 * blocks, columns)) * size).astype(np.float32)
    seen = hessian(inputs)
    made = compensated(weights, seen.matrix, factor(seen), 32)
    plain = int4_blocks(weights, 32, np.diagonal(seen.matrix).copy())
    assert made.codes.min() >= -8 and made.codes.max() <= 7
    assert np.all(made.scales > 0)
    limit = output_error(inputs, weights, plain).sum()
    assert (
        output_error(inputs, weights, (made.codes, made.scales)).sum()
        <= limit * 1.001 + 1e-9 * np.square(inputs @ weights).sum()
    )


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 4), st.integers(1, 3), st.integers(1, 8))
def test_independent_channels_are_rounded(seed: int, spread: float, blocks: int, columns: int) -> None:
    """A diagonal Hessian leaves nothing to make up for: every code is the nearest one at its scale."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((32 * blocks, columns)).astype(np.float32)
    seen = Hessian(np.diag(np.exp(rng.standard_normal(32 * blocks) * spread)).astype(np.float32), 10_000)
    made = compensated(weights, seen.matrix, factor(seen), 32)
    scales = np.repeat(made.scales.astype(np.float32), 32, axis=0)
    np.testing.assert_array_equal(made.codes, np.clip(np.rint(weights * np.reciprocal(scales)), -8, 7))


def test_factor_restores_the_damped_hessian() -> None:
    seen = hessian(rows(500, 64, 0))
    lower, pivots = factor(seen)
    damped = seen.matrix / np.diagonal(seen.matrix).mean() + DAMPING * np.eye(64)
    np.testing.assert_array_equal(np.diagonal(lower), 1)
    np.testing.assert_allclose((lower * pivots) @ lower.T, damped, atol=1e-5)


def test_each_row_makes_up_for_those_before() -> None:
    """Two equal inputs, so only the sum of their weights counts: what the last row is rounded off, the
    first puts back.
    """
    weights = np.full((32, 1), 0.5, np.float32)
    weights[0] = 7  # scale 1
    weights[30:] = [[0.4], [0.4]]
    seen = np.eye(32, dtype=np.float32)
    seen[30, 31] = seen[31, 30] = 0.999
    codes, scales, chosen, *_ = compensated(weights, seen, Factor(*factor(Hessian(seen, 1000))), 32)
    assert chosen
    assert abs(float(restored(codes, scales)[30:].sum()) - 0.8) < 0.3  # rounding alone leaves 0: 0.8 off


@pytest.mark.parametrize(("count", "least"), [(20, 0.0), (100, 0.5), (4000, 5.0)])
def test_other_rows_gain_too(count: int, least: float) -> None:
    """Even when fewer rows than the 192 channels were seen."""
    weights = np.random.default_rng(0).standard_normal((192, 64)).astype(np.float32)
    seen, others = hessian(rows(count, 192, 1)), rows(1000, 192, 2)
    made = compensated(weights, seen.matrix, factor(seen), 64)
    plain = int4_blocks(weights, 64, np.diagonal(seen.matrix).copy())
    gain = 10 * np.log10(
        output_error(others, weights, plain).sum() / output_error(others, weights, (made.codes, made.scales)).sum()
    )
    print(f"{count} rows of 192 channels: {gain:.1f} dB less error on other rows")
    assert gain > least


def test_a_dead_channel_keeps_its_weights() -> None:
    inputs = rows(500, 64, 0)
    inputs[:, 10] = 0
    weights = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    seen = hessian(inputs)
    made = compensated(weights, seen.matrix, factor(seen), 32)
    step = np.repeat(made.scales.astype(np.float32), 32, axis=0)[10]
    assert np.all(
        np.abs(restored(made.codes, made.scales)[10] - np.clip(weights[10], -8 * step, 7 * step)) <= step * 0.501
    )


@pytest.mark.parametrize(
    ("matrix", "reason"), [(np.zeros((32, 32)), "always zero"), (np.full((32, 32), 2.0) - np.eye(32), "too nearly")]
)
def test_what_cannot_be_factored(matrix: NDArray[np.float64], reason: str) -> None:
    with pytest.raises(np.linalg.LinAlgError, match=reason):
        factor(Hessian(matrix.astype(np.float32), 10_000))


# A graph of two int4 layers, the first of which has a fold.


def model(weights: dict[str, Floats]) -> ir.Model:
    """x [rows, 64] -> norm -> up [64, 512] (stored as [512, 64]) -> Relu -> down [512, 64]."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="toy")

    def value(name: str, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    for name, array in weights.items():
        found = value(name, list(array.shape))
        found.const_value = ir.tensor(array, name=name)
        graph.register_initializer(found)
    x, known = value("x", ["batch", 64]), graph.initializers
    graph.inputs.append(x)
    made: ir.Value = x
    steps: list[tuple[str, list[str], str, list[int | str]]] = [
        ("LayerNormalization", ["norm"], "normed", ["batch", 64]),
        ("MatMul", ["up"], "wide", ["batch", 512]),
        ("Relu", [], "hidden", ["batch", 512]),
        ("MatMul", ["down"], "y", ["batch", 64]),
    ]
    for op, others, output, shape in steps:
        operands = [known[other] for other in others]
        if others == ["up"]:
            turned = ir.node("Transpose", operands, {"perm": [1, 0]}, name="turn")
            turned.outputs[0].name = "up.turned"
            graph.append(turned)
            operands = [turned.outputs[0]]
        node = ir.node(op, [made, *operands], name=f"{output}/{op}")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = output, ir.Shape(shape), ir.DataType.FLOAT
        graph.append(node)
        made = node.outputs[0]
    graph.outputs.append(made)
    return ir.Model(graph, ir_version=10)


def normed(x: Floats) -> Floats:
    return np.asarray((x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True))


def toy() -> dict[str, Floats]:
    rng = np.random.default_rng(3)
    return {
        "norm": np.ones(64, np.float32),
        "up": rng.standard_normal((512, 64)).astype(np.float32),
        "down": rng.standard_normal((512, 64)).astype(np.float32),
    }


SAMPLES = [{"x": rows(200, 64, seed)} for seed in range(4)]
SCALES = np.exp(np.random.default_rng(5).standard_normal(64)).astype(np.float32)
FOLD = Fold("normed", "awq", ("up",), ("norm",), scales=SCALES)


def test_a_graph_is_compensated(tmp_path: Path) -> None:
    """Codes of folded weights, of the order [K, N] however they are stored, and what was made of each;
    twice the same.
    """
    weights = toy()
    graph = model(weights)
    paths = [tmp_path / "one", tmp_path / "two"]
    made, _ = (compensate(graph, plan(graph, INT4_EVERYWHERE), [FOLD], SAMPLES, path) for path in paths)
    assert [(one.weight, one.rows, one.reason) for one in made] == [("up", 800, ""), ("down", 800, "")]
    assert all(one.gain_db > 2 and one.share > 0.9 for one in made), made
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [record["gain_db"] for record in read_records(paths[0])] == [one.gain_db for one in made]
    known = read_codes(paths[0])
    assert set(known) == {("up", 64, False), ("down", 64, False)}
    codes, scales, _ = known["up", 64, False]()
    levels = np.stack([codes & 15, codes >> 4], axis=-1).reshape(64, 512).astype(np.int8)
    form, folded = ((levels ^ 8) - 8, scales), weights["up"].T * SCALES[:, None]
    seen = normed(np.concatenate([sample["x"] for sample in SAMPLES])) / SCALES
    snr = 10 * np.log10(np.square((seen @ folded).astype(np.float64)).sum() / output_error(seen, folded, form).sum())
    assert made[0].snr_db == pytest.approx(snr, abs=0.5)  # measured on some columns
    others = normed(rows(500, 64, 77)) / SCALES
    plain = int4_blocks(folded, 64, np.square(others).mean(axis=0))
    errors = [output_error(others, folded, one).sum() for one in (plain, form)]
    print(f"other rows: {10 * np.log10(errors[0] / errors[1]):.1f} dB less error than by rounding")
    assert errors[1] < errors[0] / 1.5


@pytest.mark.parametrize("most", [6144, 288])
def test_a_convolution_is_compensated_nested_in_int8(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in parts: on other pictures, the library's convolution with the restored kernel is nearer than with a
    rounded one.
    """
    monkeypatch.setattr(calibration.observe.windows, "MOST_ROWS", most)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((16, 64, 3, 3)).astype(np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 64, "height", "width"]))
    w = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(kernel.shape),
        const_value=ir.tensor(kernel, name="w"),
    )
    node = ir.node("Conv", [x, w], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, name="conv")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = (
        "y",
        ir.DataType.FLOAT,
        ir.Shape(["batch", 16, None, None]),
    )
    graph = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 23}, name="toy"), ir_version=10
    )
    layers = plan(graph, replace(RECIPES["int4"], spare_last=False))
    assert [(one.weight_type, one.block, one.nested) for one in layers] == [("int4", 64, True)]
    pictures = [rows(20 * 24, 64, seed).reshape(1, 20, 24, 64).transpose(0, 3, 1, 2) for seed in range(6)]
    (made,) = compensate(graph, layers, [], [{"x": picture} for picture in pictures[:4]], tmp_path / "codes")
    assert (made.rows, made.share, made.reason) == (4 * 10 * 12, 1.0, "") and made.gain_db > 2
    codes, factors, base = read_codes(tmp_path / "codes")["w", 64, True]()
    assert base is not None and factors.min() >= 1 and factors.max() <= 15 and not np.any(factors % 1)
    nearest, plain_factors, plain_base = nested_blocks(kernel.reshape(16, -1).T, 64)
    np.testing.assert_array_equal(base, plain_base)

    def error(levels: NDArray[np.int8], scales: NDArray[np.float16]) -> float:
        restored = (
            np.multiply(levels, np.repeat(scales.astype(np.float32), 64, axis=0)) * base - kernel.reshape(16, -1).T
        )
        found = [
            torch.conv2d(torch.from_numpy(picture), torch.from_numpy(restored.T.reshape(kernel.shape)), None, 2, 1)
            for picture in pictures[4:]
        ]
        return float(sum(one.square().sum() for one in found))

    gain = 10 * np.log10(error(nearest, plain_factors) / error(unpack_int4(codes), factors))
    print(f"other pictures: {gain:.1f} dB less error than by rounding")
    assert gain > 1.5


def test_an_input_that_is_always_zero_is_rounded_for_a_reason(tmp_path: Path) -> None:
    weights = toy() | {"norm": np.zeros(64, np.float32)}
    graph = model(weights)
    made = compensate(graph, plan(graph, INT4_EVERYWHERE), [], SAMPLES, tmp_path / "codes")
    assert [one.reason for one in made] == ["its inputs were always zero"] * 2
    codes, _, _ = read_codes(tmp_path / "codes")["down", 64, False]()
    assert codes.any()


def test_nothing_is_left_behind_by_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    weights = toy()
    weights["down"][3, 3] = np.nan
    graph = model(weights)
    with pytest.raises(SourceError, match="'down' holds NaN"):
        compensate(graph, plan(graph, INT4_EVERYWHERE), [], SAMPLES, tmp_path / "codes")
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite(tmp_path: Path) -> None:
    graph = model(toy())
    with pytest.raises(InvalidInput, match="'normed' of toy holds NaN"):
        compensate(
            graph,
            plan(graph, INT4_EVERYWHERE),
            [],
            [*SAMPLES, {"x": np.full((1, 64), np.inf, np.float32)}],
            tmp_path / "codes",
        )
    assert not list(tmp_path.iterdir())


def test_a_file_that_holds_no_codes(tmp_path: Path) -> None:
    (tmp_path / "codes").write_bytes(b"nothing of the kind")
    with pytest.raises(SourceError, match="cannot be read as int4 codes"):
        read_codes(tmp_path / "codes")
