"""The gate between a graph and its source: it lets the faithful pass, and names submodel, tensor and error of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import CLIPTextModel

from export.family import Part
from export.options import Options
from export.parity import check, mapped
from export.state import Build, part_graph
from export.tensors import TensorRef
from runtime.errors import ParityError

Prepared = tuple[Part, ir.Model, dict[str, TensorRef]]


@pytest.fixture(scope="module")
def state(tiny_diffusion: Path) -> Build:
    return Build.open(Options(str(tiny_diffusion), Path("nowhere")))


@pytest.fixture
def prepared(state: Build) -> Prepared:
    """The text encoder, its graph and its weights."""
    part = next(part for part in state.parts if part.name == "text_encoder")
    return part, part_graph(state, part), state.weights(part)


def test_a_faithful_graph_passes(prepared: Prepared) -> None:
    part, model, weights = prepared
    found = check(part, model, weights, "full")
    assert (found.method, found.tensor, found.floor) == ("full", "last_hidden_state", part.floor)
    assert 0 < found.error < 1e-5 and found.snr_db > 90


def test_swapped_weights_are_found(prepared: Prepared) -> None:
    part, model, weights = prepared
    keys = [f"encoder.layers.0.self_attn.{name}_proj.weight" for name in ("k", "v")]
    first, second = (model.graph.initializers[key] for key in keys)
    first.const_value, second.const_value = second.const_value, first.const_value
    with pytest.raises(
        ParityError, match=r"submodel 'text_encoder': output 'last_hidden_state' .* by \d\.\d\de[-+]\d\d of its largest value"
    ):
        check(part, model, weights, "full")


def test_a_single_altered_bias_is_found(prepared: Prepared) -> None:
    part, model, weights = prepared
    value = model.graph.initializers["final_layer_norm.bias"]
    assert value.const_value is not None
    bias = value.const_value.numpy().copy()
    bias[3] += np.float16(0.5)
    value.const_value = ir.tensor(bias, name=value.name)
    with pytest.raises(ParityError, match="expected at most 1e-03"):
        check(part, model, weights, "full")


def test_the_floor_is_the_part_s(prepared: Prepared) -> None:
    part, model, weights = prepared
    with pytest.raises(ParityError, match="expected at most 1e-12"):
        check(replace(part, floor=1e-12), model, weights, "full")


def test_what_is_not_a_number_is_beyond_every_floor(prepared: Prepared) -> None:
    part, model, weights = prepared
    value = model.graph.initializers["final_layer_norm.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), np.nan), name=value.name)
    with pytest.raises(ParityError, match="by nan of its largest value"):
        check(replace(part, floor=1e9), model, weights, "full")


def test_the_torch_side_is_the_library_s_float32_model(prepared: Prepared, tiny_diffusion: Path) -> None:
    part, _, weights = prepared
    ids = torch.arange(12).reshape(2, 6)
    with mapped(part, weights), torch.inference_mode():
        got = part.module(ids)[0]
        expected = CLIPTextModel.from_pretrained(tiny_diffusion / "text_encoder", dtype="float32")(ids).last_hidden_state
    assert torch.allclose(got, expected, atol=1e-6)
    assert all(parameter.is_meta for parameter in part.module.parameters()), "nothing stays in memory"
