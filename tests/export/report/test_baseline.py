"""PyTorch as an engine, and bundles timed beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.ground.progress import listening
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.report.baseline import TorchEngine, compare_speed, torch_model
from export.report.speed import WHOLE
from export.report.timed import time_bundle
from export.task import SpeedEffort
from runtime.bundle.manifest import Bundle
from runtime.engine import Slot
from runtime.errors import EngineUnavailable, InvalidInput, UnsupportedModel
from runtime.placing.loading import LoadedModel, load_model

EFFORT = SpeedEffort(turns=2, steps=2, tokens=4)


@pytest.fixture(scope="module")
def drawing_state(tiny_diffusion: Path) -> Build:
    return Build.open(Options(str(tiny_diffusion), Path("unused")))


@pytest.fixture(scope="module")
def talking_state(tiny_vlm: Path) -> Build:
    return Build.open(Options(str(tiny_vlm), Path("unused")))


@pytest.fixture(scope="module")
def talking(tiny_bundle: Path) -> Iterator[LoadedModel]:
    model = load_model(tiny_bundle, "onnxruntime")
    yield model
    model.close()


def in_torch(model: LoadedModel, state: Build) -> LoadedModel:
    return torch_model(model, state.family.parts(state.source, False), state.weights)


def test_a_decoder_in_torch_gives_what_the_engine_gives(talking: LoadedModel, talking_state: Build) -> None:
    model = in_torch(talking, talking_state)
    assert (model.target, model.device) == ("torch", "torch:cpu")
    rng = np.random.default_rng(0)
    calls = [rng.standard_normal((1, length, 32)).astype(np.float32) for length in (5, 1, 1)]
    slots = {id(one): Slot() for one in (model, talking)}
    total = 0
    for embeds in calls:
        start, total = total, total + embeds.shape[1]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(start, total, dtype=np.int64)[None],
        }
        wanted, got = (one.engines["decoder"].run(inputs, slots[id(one)])["logits"] for one in (talking, model))
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    for one in (model, talking):
        one.engines["decoder"].trim(slots[id(one)], 3)
    inputs = {"inputs_embeds": calls[1], "attention_mask": np.ones((1, 4), np.int64), "position_ids": np.array([[3]])}
    wanted, got = (one.engines["decoder"].run(inputs, slots[id(one)])["logits"] for one in (talking, model))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    model.engines["decoder"].trim(slots[id(model)], 0)
    first = {"inputs_embeds": calls[1], "attention_mask": np.ones((1, 1), np.int64), "position_ids": np.array([[0]])}
    assert np.isfinite(model.engines["decoder"].run(first, slots[id(model)])["logits"]).all()
    assert model.engines["decoder"]._module is not talking_state.parts[2].module  # type: ignore[attr-defined]
    model.close()


def test_stateless_parts_in_torch_give_what_the_engine_gives(talking: LoadedModel, talking_state: Build) -> None:
    model = in_torch(talking, talking_state)
    for name in ("vision_encoder", "token_embedding"):
        signature = talking.bundle.submodel(name).signature
        inputs = signature.sample(signature.sample_lengths())
        for output, wanted in talking.engines[name].run(inputs).items():
            np.testing.assert_allclose(model.engines[name].run(inputs)[output], wanted, atol=1e-4)


def test_the_build_keeps_its_modules_without_weights(talking: LoadedModel, talking_state: Build) -> None:
    in_torch(talking, talking_state)
    assert all(parameter.is_meta for part in talking_state.parts for parameter in part.module.parameters())


def test_what_the_library_cannot_generate_with(talking: LoadedModel, talking_state: Build) -> None:
    parts = talking_state.family.parts(talking_state.source, False)
    strange = nn.ModuleList([parts[2].module])
    parts[2] = replace(parts[2], components=(replace(parts[2].components[0], model=strange),))
    weights = {
        f"0.{name}": talking_state.weights(talking_state.parts[2])[known]
        for name, known in names(talking_state).items()
    }
    with pytest.raises(UnsupportedModel, match="'decoder' is no model of transformers"):
        TorchEngine(talking.bundle.submodel("decoder"), parts[2], weights)


def names(state: Build) -> dict[str, str]:
    return state.parts[2].parameters()


def test_bundles_are_timed_in_turns(tiny_bundle: Path, talking_state: Build) -> None:
    heard: list[str] = []
    threads = torch.get_num_threads()
    parts = talking_state.family.parts(talking_state.source, False)
    with listening(lambda position: heard.append(str(position))):
        speed = compare_speed(Bundle(tiny_bundle), Bundle(tiny_bundle), parts, talking_state.weights, EFFORT)
    assert heard and speed.left_out == () and torch.get_num_threads() == threads
    kinds = [(timing.submodel, timing.what, timing.tokens, timing.calls) for timing in speed.timings]
    assert [kind[0] for kind in kinds] == [
        "token_embedding",
        "vision_encoder",
        "decoder",
        "token_embedding",
        "decoder",
        WHOLE,
    ]
    assert kinds[4] == ("decoder", "next token", 1, 3) and kinds[5] == (WHOLE, "answer, 4 tokens", 0, 1)
    assert kinds[2][1] == f"prompt of {kinds[2][2]} tokens" and kinds[2][2] > 4
    for timing in speed.timings:
        assert [timed.target for timed in timing.times] == [
            "torch",
            *(name for name in Bundle(tiny_bundle).targets for _ in range(2)),
        ]
        assert all(timed.spread.repetitions == 2 and timed.spread.median > 0 for timed in timing.times)
    whole = speed.timings[-1].times
    assert all(
        sum(timing.calls * timing.times[i].spread.minimum for timing in speed.timings[:-1]) <= timed.spread.maximum
        for i, timed in enumerate(whole)
    )
    assert speed.main.submodel in ("vision_encoder", "decoder") and speed.threads >= 1
    assert {"torch", "transformers", "onnxruntime", "openvino"} <= set(speed.versions)
    assert speed.others is None or 0 <= speed.others <= 1


def test_what_torch_cannot_run_is_left_out(tiny_bundle: Path, talking_state: Build) -> None:
    parts = talking_state.family.parts(talking_state.source, False)
    parts[0] = replace(parts[0], module=Broken(parts[0].module))
    speed = compare_speed(Bundle(tiny_bundle), Bundle(tiny_bundle), parts, talking_state.weights, EFFORT)
    assert speed.left_out == ("torch: PyTorch could not run vision_encoder: TypeError: not made for this",)
    assert {timed.target for timing in speed.timings for timed in timing.times} == set(Bundle(tiny_bundle).targets)


class Broken(nn.Module):
    """A module whose weights are there, but which cannot run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: torch.Tensor) -> None:
        raise TypeError("not made for this")


def test_no_target_can_be_used(tiny_bundle: Path, talking_state: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bundle: Bundle, wanted: str) -> None:
        raise EngineUnavailable(f"{wanted} needs another machine")

    monkeypatch.setattr("export.report.baseline.choose_target", refuse)
    with pytest.raises(EngineUnavailable, match="onnxruntime needs another machine"):
        compare_speed(Bundle(tiny_bundle), Bundle(tiny_bundle), [], talking_state.weights)


def test_a_bundle_is_timed_anew(tiny_diffusion: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(tiny_diffusion), tmp_path / "bundle", quant="int4", quality="none"))
    speed = time_bundle(bundle, str(tiny_diffusion), effort=EFFORT)
    assert [timing.submodel for timing in speed.timings] == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
        WHOLE,
    ]
    assert [timing.calls for timing in speed.timings] == [1, 2, 1, 0, 1]
    assert [(timed.target, timed.quant) for timed in speed.timings[1].times] == [
        ("torch", "none"), ("onnxruntime", "none"), ("onnxruntime", "int4"),
    ]  # fmt: skip
    assert speed.timings[-1].what == "picture, 2 steps"
    with pytest.raises(InvalidInput, match="is not the checkpoint"):
        time_bundle(Bundle(tiny_bundle), str(tiny_diffusion))
