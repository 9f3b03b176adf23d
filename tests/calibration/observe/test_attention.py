"""Attention in bfloat16: harmless where scores are small, seen where they are not; decoders' is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from calibration.observe.attention import attention_in_half

BATCH, HEADS, LENGTH, SIZE = 2, 2, 16, 8


def tensor(name: str, *dims: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))


def attending(past: bool = False) -> ir.Model:
    """y = Attention(q, k, v), over a past or not."""
    operands = [tensor(name, "batch", HEADS, LENGTH, SIZE) for name in ("q", "k", "v")]
    states = [tensor(name, "batch", HEADS, "past", SIZE) for name in ("past_k", "past_v")] if past else []
    node = ir.node(
        "Attention",
        [*operands, *([None, *states] if past else [])],
        {"scale": 1.0},
        num_outputs=3 if past else 1,
        name="attn",
    )
    for value, name in zip(node.outputs, ("y", "present_k", "present_v"), strict=False):
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, operands[0].shape
    graph = ir.Graph([*operands, *states], node.outputs[:1], nodes=[node], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def operands(scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal((BATCH, HEADS, LENGTH, SIZE)) * scale).astype(np.float32) for name in ("q", "k", "v")
    }


def test_larger_scores_lose_more() -> None:
    small, large = (attention_in_half(attending(), [operands(scale)])["attn"] for scale in (0.5, 3.0))
    print(f"{small:.1f} dB at scores of about 1, {large:.1f} dB at about 25")
    assert small > 50 and large < 46


def test_the_worst_call_counts() -> None:
    calls = [operands(scale) for scale in (0.5, 3.0)]
    alone = attention_in_half(attending(), calls[1:])["attn"]
    assert attention_in_half(attending(), calls)["attn"] == pytest.approx(alone)


def test_what_is_not_measured() -> None:
    assert attention_in_half(attending(past=True), [operands(1.0)]) == {}
    assert attention_in_half(attending(), []) == {}
    assert attention_in_half(attending(), [operands(0.0)]) == {"attn": np.inf}
