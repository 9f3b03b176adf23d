"""Attention as ONNX Runtime's own operators: nothing is moved twice, caches lie where the kernel reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError
from runtime.targets.lowering import attention
from runtime.targets.lowering.attention import with_grouped_cache, with_multihead
from runtime.targets.lowering.half import to_half
from tests.runtime.targets.conftest import run, snr_db, toy, value


def counted(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def projected(joined: bool = True) -> ir.Model:
    """Attention of two heads between Reshapes and Transposes, as exporters write it; `joined`: nobody else reads its
    output.
    """
    x = value("x", ["batch", "sequence", 8])
    shape, back = ir.Value(name="shape"), ir.Value(name="back")
    split = ir.node("Reshape", [x, shape], name="split")
    split.outputs[0].shape, split.outputs[0].type = ir.Shape(["batch", "sequence", 2, 4]), x.type
    turned = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]}, name="turned")
    turned.outputs[0].shape, turned.outputs[0].type = ir.Shape(["batch", 2, "sequence", 4]), x.type
    heads = turned.outputs[0]
    made = ir.node("Attention", [heads, heads, heads], {"scale": 0.5}, name="attention")
    made.outputs[0].shape, made.outputs[0].type = heads.shape, x.type
    moved = ir.node("Transpose", [made.outputs[0]], {"perm": [0, 2, 1, 3]}, name="moved")
    moved.outputs[0].type = x.type
    packed = ir.node("Reshape", [moved.outputs[0], back], name="packed")
    packed.outputs[0].shape, packed.outputs[0].type, packed.outputs[0].name = (
        ir.Shape(["batch", "sequence", 8]),
        x.type,
        "y",
    )
    nodes = [split, turned, made, moved, packed]
    if not joined:
        other = ir.node("Relu", [made.outputs[0]], name="other")
        other.outputs[0].type = x.type
        nodes.append(other)
    return toy(nodes, [x], {"shape": np.array([0, 0, 2, 4]), "back": np.array([0, 0, 8])})


@pytest.mark.parametrize("joined", [True, False])
def test_what_is_packed_already_is_not_moved(joined: bool) -> None:
    model = projected(joined)
    lowered = model.clone()
    with_multihead(lowered)
    RemoveUnusedNodesPass()(lowered)
    wanted = {"MultiHeadAttention": 1} if joined else {"MultiHeadAttention": 1, "Reshape": 1, "Transpose": 1, "Relu": 1}
    assert counted(lowered) == wanted
    feed = {"x": np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)}
    assert snr_db(run(lowered, feed), run(model, feed)) > 110


def test_a_decoder_is_left_without_a_mask(tiny_bundle: Path) -> None:
    """GroupQueryAttention counts the mask's ones; what made the mask for `Attention` is gone."""
    bundle = Bundle(tiny_bundle)
    submodel = bundle.submodel("decoder")
    model = ir.load(bundle.root / submodel.graph)
    layers = counted(model)["Attention"]
    with_grouped_cache(model, submodel.signature)
    found = counted(model)
    assert found["GroupQueryAttention"] == layers and not {"Attention", "LessOrEqual", "And", "Range"} & set(found)
    names = [output.name for output in model.graph.outputs]
    assert names == [tensor.name for tensor in submodel.signature.graph_outputs]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_caches_have_the_type_that_attention_computes_in(tiny_bundle: Path, half: Any) -> None:
    bundle = Bundle(tiny_bundle)
    submodel = bundle.submodel("decoder")
    model = to_half(ir.load(bundle.root / submodel.graph), half)
    with_grouped_cache(model, submodel.signature)
    types = {found.name: found.dtype for found in (*model.graph.inputs, *model.graph.outputs)}
    for state in submodel.signature.states:
        assert types[state.past.name] == types[state.present.name] == ir.DataType[half.upper()]
    assert types["logits"] == types["inputs_embeds"] == ir.DataType.FLOAT
    (grouped, *_) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert {found.dtype for found in grouped.inputs[:5] if found is not None} == {ir.DataType[half.upper()]}


def test_attention_of_another_form() -> None:
    q = value("q", ["batch", "sequence", 8])
    made = ir.node("Attention", [q, q, q], {"q_num_heads": 2, "kv_num_heads": 2}, name="packed")
    made.outputs[0].type = q.type
    with pytest.raises(EngineError, match=r"node 'packed' is no Attention over \[batch, heads, length, size\]"):
        with_multihead(toy([made], [q]))


def test_heads_that_the_kernel_does_not_take_are_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself would refuse them in the first call, when the bundle is in use."""
    submodel = Bundle(tiny_bundle).submodel("decoder")
    monkeypatch.setattr(attention, "HEAD_STEP", 16)
    with pytest.raises(EngineError, match=r"has heads of 8 values .* takes multiples of 16: build for another target"):
        with_grouped_cache(ir.load(tiny_bundle / submodel.graph), submodel.signature)
