"""What opset 21 and the tables lack becomes what they have, and computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.targets.lowering.opset21 import to_opset21
from runtime.targets.sessions.kernels import CUDA, DIRECTML, Provider, outside
from tests.runtime.targets.conftest import run, snr_db, toy, value

RNG = np.random.default_rng(0)
EXACT = 110.0
"""dB between float32 computations that differ in their order alone."""
PROVIDERS = (DIRECTML, CUDA)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def agree(model: ir.Model, feed: Mapping[str, NDArray[Any]], providers: Sequence[Provider] = PROVIDERS) -> ir.Model:
    """Lower for each provider, see that it has kernels for all, and compare. Returns the last graph."""
    wanted = run(model, feed)
    lowered = model
    for provider in providers:
        lowered = model.clone()
        to_opset21(lowered, provider)
        assert lowered.opset_imports[""] == 21
        assert not list(outside(lowered, provider))
        assert snr_db(run(lowered, feed), wanted) > EXACT
    return lowered


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def one(
    operator: str,
    inputs: Sequence[ir.Value | None],
    constants: Mapping[str, NDArray[Any]],
    dtype: Any = None,
    **attributes: Any,
) -> ir.Model:
    """A graph of one node."""
    given_ = [item for item in inputs if item is not None and item.name not in constants]
    made = ir.node(operator, list(inputs), attributes, name=operator.lower())
    made.outputs[0].name = "y"
    made.outputs[0].type = ir.TensorType(dtype or ir.DataType.FLOAT)
    made.outputs[0].shape = given_[0].shape
    return toy([made], given_, constants)


@settings(max_examples=15)
@given(
    groups=st.integers(1, 4),
    each=st.integers(1, 3),
    lengths=st.lists(st.integers(4, 6), min_size=1, max_size=3),
    batch=st.integers(1, 3),
)
def test_group_normalization(groups: int, each: int, lengths: list[int], batch: int) -> None:
    channels = groups * each
    constants = {"weight": normal(channels), "bias": normal(channels)}
    x = value("x", ["batch", channels, *(f"d{i}" for i in range(len(lengths)))])
    model = one(
        "GroupNormalization",
        [x, ir.Value(name="weight"), ir.Value(name="bias")],
        constants,
        num_groups=groups,
        epsilon=1e-3,
    )
    agree(model, {"x": normal(batch, channels, *lengths) * 3 + 1})


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    model = one("Gelu", [value("x", ["n", 8])], {}, approximate=approximate)
    lowered = agree(model, {"x": 3 * normal(5, 8)}, [DIRECTML])
    assert operators(lowered) == ["FastGelu" if approximate == "tanh" else "Gelu"]
    agree(model, {"x": 3 * normal(5, 8)}, [CUDA])


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_normalization(axis: int) -> None:
    shape = (3, 4, 8)
    model = one(
        "RMSNormalization",
        [value("x", shape), ir.Value(name="scale")],
        {"scale": normal(*shape[axis:])},
        axis=axis,
        epsilon=1e-5,
    )
    lowered = agree(model, {"x": normal(*shape)})
    assert operators(lowered) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]


def test_a_body_of_an_older_opset() -> None:
    lowered = agree(one("Mish", [value("x", ["n", 8])], {}), {"x": normal(4, 8)})
    assert operators(lowered) == ["Softplus", "Tanh", "Mul"]


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("partial", [0, 4])
def test_rotary_embedding(interleaved: int, partial: int) -> None:
    """By the body that the standard gives it."""
    size = partial or 8
    constants = {"cos": normal(16, size // 2), "sin": normal(16, size // 2)}
    positions = value("positions", ["batch", "sequence"], ir.DataType.INT64)
    inputs = [value("x", ["batch", 2, "sequence", 8]), ir.Value(name="cos"), ir.Value(name="sin"), positions]
    attributes = {"interleaved": interleaved} | ({"rotary_embedding_dim": partial} if partial else {})
    model = one("RotaryEmbedding", inputs, constants, **attributes)
    feed = {"x": normal(2, 2, 5, 8), "positions": np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])}
    lowered = agree(model, feed)
    assert not {"RotaryEmbedding", "Identity", "Constant"} & set(operators(lowered)) and not lowered.functions


def test_equal_where_there_is_none() -> None:
    x, y = value("x", ["n"], ir.DataType.INT64), value("z", ["n"], ir.DataType.INT64)
    same = ir.node("Equal", [x, y], name="equal")
    same.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    number = ir.node("Cast", [same.outputs[0]], {"to": ir.DataType.FLOAT}, name="cast")
    number.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model = toy([same, number], [x, y])
    feed = {"x": np.array([1, 2, 3, -4]), "z": np.array([1, 3, 2, -4])}
    assert operators(agree(model, feed)) == ["LessOrEqual", "GreaterOrEqual", "And", "Cast"]


def attention(
    heads: int, groups: int, sizes: tuple[int, int], mask: Sequence[int | str] | None, **attributes: Any
) -> ir.Model:
    """Attention [batch, heads, length, size] over keys of another length, and a boolean mask of the given dims."""
    length, size = sizes
    inputs = [
        value("q", ["batch", heads, "sequence", size]),
        *(value(name, ["batch", groups, length, size]) for name in "kv"),
    ]
    if mask is not None:
        inputs.append(value("mask", mask, ir.DataType.BOOL))
    return one("Attention", inputs, {}, **attributes)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("mask", [None, (1, 1, 5, 7), (3, 1, 5, 7), (3, 6, 5, 7)], ids=str)
def test_attention(heads: int, groups: int, mask: tuple[int, ...] | None) -> None:
    mask = mask and (*mask[:1], min(mask[1], heads), *mask[2:])
    model = attention(heads, groups, (7, 8), mask, scale=0.3)
    feed = {"q": normal(3, heads, 5, 8), "k": normal(3, groups, 7, 8), "v": normal(3, groups, 7, 8)}
    if mask is not None:
        allowed = RNG.random(mask) < 0.7
        allowed[..., 0] = True
        feed["mask"] = allowed  # type: ignore[assignment]
    lowered = agree(model, feed)
    assert ("MultiHeadAttention" in operators(lowered)) == (heads == groups)


def test_attention_without_a_scale() -> None:
    agree(
        attention(2, 2, (7, 16), None), {"q": normal(1, 2, 3, 16), "k": normal(1, 2, 7, 16), "v": normal(1, 2, 7, 16)}
    )


@pytest.mark.parametrize(("name", "number"), [("is_causal", 1), ("softcap", 20.0), ("qk_matmul_output_mode", 1)])
def test_what_no_kernel_does(name: str, number: Any) -> None:
    with pytest.raises(EngineError, match=f"node 'attention' has {name}={number}, expected"):
        to_opset21(attention(2, 2, (7, 8), None, **{name: number}), DIRECTML)


def test_grouped_heads_over_keys_of_varying_length() -> None:
    model = one("Attention", [value("q", ["b", 4, "s", 8]), *(value(name, ["b", 2, "t", 8]) for name in "kv")], {})
    with pytest.raises(EngineError, match="'attention' has grouped heads over keys of varying length"):
        to_opset21(model, DIRECTML)


@settings(max_examples=20)
@given(start=st.integers(0, 6), length=st.integers(1, 6), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_new_keys_are_written_where_they_belong(start: int, length: int, batch: int, heads: int) -> None:
    cache, new = value("cache", ["batch", heads, 12, 4]), value("new", ["batch", heads, "sequence", 4])
    starts = value("write_indices", ["batch"], ir.DataType.INT64)
    model = one("TensorScatter", [cache, new, starts], {}, axis=-2)
    model.opset_imports[""] = 24
    feed = {
        "cache": normal(batch, heads, 12, 4),
        "new": normal(batch, heads, length, 4),
        "write_indices": np.full(batch, start),
    }
    lowered = model.clone()
    to_opset21(lowered, DIRECTML)
    assert not list(outside(lowered, DIRECTML))
    np.testing.assert_array_equal(run(lowered, feed), run(model, feed))


def test_what_opset_23_added_to_the_scale_is_left_out() -> None:
    codes, scale = RNG.integers(-100, 100, (4, 8)).astype(np.int8), np.float32(0.1)
    x = value("x", ["n", 8], ir.DataType.INT8)
    given_scale = one("DequantizeLinear", [x, ir.Value(name="scale")], {"scale": np.array(scale)}, output_dtype=1)
    lowered = agree(given_scale, {"x": codes})
    assert "output_dtype" not in lowered.graph[0].attributes
