"""The gate between a graph and its source: it lets the faithful pass, and names submodel, tensor and error of the
others.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import CLIPTextModel

import export.architecture.decoders
from export.build.build import _parity
from export.build.options import Options
from export.build.state import Build, part_graph
from export.checkpoint.source import resolve
from export.checkpoint.tensors import TensorRef
from export.checks.parity import beyond_reach, check, mapped, samples
from export.family import Part, family_of
from export.finished.agreement import REACH
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
        ParityError,
        match=r"submodel 'text_encoder': output 'last_hidden_state' .* by \d\.\d\de[-+]\d\d of its largest value",
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
        got = part.reference(ids)[0]
        expected = CLIPTextModel.from_pretrained(tiny_diffusion / "text_encoder", dtype="float32")(
            ids
        ).last_hidden_state
    assert torch.allclose(got, expected, atol=1e-6)
    assert all(parameter.is_meta for parameter in part.components[0].model.parameters()), "nothing stays in memory"


# Decoders


def windowed(source: Path, folder: Path, window: int) -> Path:
    """A copy of a tiny LLaVA whose decoder has a window of attention."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": window}
    file.write_text(json.dumps(config))
    return folder


def decoder_of(source: Path) -> Part:
    found = resolve(str(source))
    return next(part for part in family_of(found).parts(found, False) if part.name == "decoder")


@pytest.mark.parametrize("window", [12, 4096], ids=["within-a-sample", "on-the-twin"])
def test_a_fault_of_the_traced_module_is_found(
    tiny_vlm: Path, tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own model is what a graph is compared with: a wrapper that lost the window would agree
    with itself.
    """
    source = windowed(tiny_vlm, tmp_path / "source", window)
    config = json.loads((source / "config.json").read_bytes())
    config["text_config"]["max_position_embeddings"] = 8192
    (source / "config.json").write_text(json.dumps(config))
    mask = export.architecture.decoders._mask

    def plain(**arguments: Any) -> torch.Tensor:
        return mask(**arguments | {"mask_function": lambda row, head, query, key: key <= query})

    monkeypatch.setitem(
        export.architecture.decoders.AttentionMaskInterface._global_mapping,
        export.architecture.decoders.ATTENTION,
        plain,
    )
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    opened = Build.open(Options(str(source), tmp_path / "bundle"))
    with pytest.raises(ParityError, match="submodel 'decoder': output '"):
        _parity(opened, next(part for part in opened.parts if part.name == "decoder"))


def test_calls_of_a_decoder_leave_every_window_and_reach_the_end_of_the_context(tiny_vlm: Path, tmp_path: Path) -> None:
    signature = decoder_of(windowed(tiny_vlm, tmp_path / "source", 40)).signature
    calls = list(samples(signature))
    totals = [call["attention_mask"].shape[1] for call in calls]
    counts = [call["position_ids"].shape[1] for call in calls]
    assert totals == list(np.cumsum(counts)) and counts[-1] == 1 and max(totals) < REACH
    assert (
        signature.windows == (40,)
        and sum(total > 40 for total in totals) >= 2
        and sum(total < 40 for total in totals) >= 2
    )
    assert calls[-1]["position_ids"].max() == signature.dims["total"].max - 1
    assert not beyond_reach(signature) and beyond_reach(decoder_of(windowed(tiny_vlm, tmp_path / "far", 500)).signature)


def test_a_window_as_long_as_the_context_is_none(tiny_vlm: Path, tmp_path: Path) -> None:
    assert decoder_of(windowed(tiny_vlm, tmp_path / "source", 1024)).signature.windows == (0,)
