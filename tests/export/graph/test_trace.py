"""Graphs made without weights: no memory of the model's size, names a reader knows, dims of the signature, attention in
one node.
"""

from __future__ import annotations

import resource
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import export.build.parts
from export.build.parts import TOOLS, versions_of
from export.checkpoint.source import resolve
from export.family import Part, family_of
from export.graph.trace import OPSET, trace, without_weights
from export.graph.weights import absent_weights, save_traced
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor

ROWS = Dim(name="rows", min=1, opt=8, max=64)


def signature(width: int, out: int) -> Signature:
    return Signature(
        inputs=(Tensor(name="x", dtype="float32", dims=(BATCH, ROWS, width)),),
        outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, ROWS, out)),),
    )


class Large(nn.Module):
    """68 GB of float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(65_536, 65_536) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return (x,)


def test_no_weight_is_ever_allocated(tmp_path: Path) -> None:
    with without_weights():
        module = Large()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = trace(module, signature(65_536, 65_536))
    save_traced(model, tmp_path / "large.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KiB"
    assert (tmp_path / "large.onnx").stat().st_size < 100_000
    weights = {name: value for name, value in model.graph.initializers.items() if name.startswith("layers.")}
    assert weights.keys() == dict(module.named_parameters()).keys()
    assert sum(int(np.prod(value.shape.numpy())) for value in weights.values() if value.shape is not None) > 17e9


@pytest.fixture(scope="module")
def parts(tiny_vlm: Path, tiny_diffusion: Path) -> dict[str, Part]:
    sources = [resolve(str(path)) for path in (tiny_vlm, tiny_diffusion)]
    return {part.name: part for source in sources for part in family_of(source).parts(source, False)}


@pytest.fixture(scope="module")
def traced(parts: dict[str, Part], tiny_vlm: Path) -> dict[str, ir.Model]:
    """Graphs as builds keep them."""
    source, tools = resolve(str(tiny_vlm)), versions_of(TOOLS)
    names = ("decoder", "vision_encoder", "text_encoder")
    return {name: ir.load(export.build.parts.traced(source, parts[name], tools)) for name in names}


@pytest.mark.parametrize("name", ["decoder", "vision_encoder", "text_encoder"])
def test_the_graph_is_what_the_signature_says(parts: dict[str, Part], traced: dict[str, ir.Model], name: str) -> None:
    part, graph = parts[name], traced[name].graph
    assert graph.opset_imports[""] == OPSET == 23
    for values, tensors in ((graph.inputs, part.signature.graph_inputs), (graph.outputs, part.signature.graph_outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            assert value.shape is not None and value.dtype is not None
            dims = [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
            assert dims == [dim.name if isinstance(dim, Dim) else dim for dim in tensor.dims]
            assert value.dtype.numpy() == np.dtype(tensor.dtype)


@pytest.mark.parametrize("name", ["decoder", "vision_encoder", "text_encoder"])
def test_names_are_the_library_s(parts: dict[str, Part], traced: dict[str, ir.Model], name: str) -> None:
    graph, module = traced[name].graph, parts[name].module
    parameters = {value.name for value in absent_weights(traced[name])}
    assert parameters <= dict(module.named_parameters(remove_duplicate=False)).keys()
    unused = dict(module.named_parameters()).keys() - parameters
    elsewhere = (
        "embed_tokens",
        "layers.1.",
        "post_layernorm",
    )  # of LLaVA: its embedding is a submodel, the tower's last layer is not read
    assert parameters and all(any(part in key for part in elsewhere) for key in unused)
    names = [node.name for node in graph]
    assert None not in names and len(set(names)) == len(names)
    modules = dict(module.named_modules()).keys()
    placed = [n.rpartition("/")[0] for n in names if n and "/" in n]
    assert len(placed) > 0.6 * len(names)
    known = sum(any(place == module or module.endswith(f".{place}") for module in modules) for place in placed)
    assert known > 0.9 * len(placed), [place for place in placed if place not in modules][:5]


def test_one_attention_node_a_layer(parts: dict[str, Part], traced: dict[str, ir.Model]) -> None:
    for name, model in traced.items():
        kinds = Counter(node.op_type for node in model.graph)
        config = parts[name].components[0].model.config
        layers = {
            "decoder": lambda c: c.text_config.num_hidden_layers,
            "text_encoder": lambda c: c.num_hidden_layers,
            "vision_encoder": lambda c: c.vision_config.num_hidden_layers - 1,
        }[name](config)
        assert kinds["Attention"] == layers and not kinds["Softmax"], name


def test_the_decoder_s_attention_keeps_past_and_grouped_heads(traced: dict[str, ir.Model]) -> None:
    attention = [node for node in traced["decoder"].graph if node.op_type == "Attention"]
    for layer, node in enumerate(attention):
        assert [value.name for value in node.inputs[4:6] if value] == [
            f"past_key_values.{layer}.{kind}" for kind in ("key", "value")
        ]
        assert [value.name for value in node.outputs[1:3]] == [f"present.{layer}.{kind}" for kind in ("key", "value")]
        heads = [value.shape[1] for value in node.inputs[:2] if value is not None and value.shape is not None]
        assert heads == [4, 2]


def test_shapes_are_constants_where_they_can_be(traced: dict[str, ir.Model]) -> None:
    for model in traced.values():
        for node in model.graph:
            if node.op_type == "Reshape":
                shape = node.inputs[1]
                assert shape is not None and shape.const_value is not None, node.name


def test_tracing_again_or_loading_gives_the_same_bytes(
    parts: dict[str, Part], traced: dict[str, ir.Model], tmp_path: Path
) -> None:
    part = parts["text_encoder"]
    save_traced(trace(part.module, part.signature), tmp_path / "a.onnx")
    save_traced(traced["text_encoder"], tmp_path / "b.onnx")
    save_traced(ir.load(tmp_path / "a.onnx"), tmp_path / "c.onnx")
    assert (
        (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
    )
