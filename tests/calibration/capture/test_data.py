"""The capture: real inputs, the same ones every time, every noise level alike, and never lost once a
request is done.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from calibration.capture.data import PER_REQUEST, SAMPLES, Done, record
from calibration.capture.sets import CalibrationSet
from calibration.requests.files import read_images, read_prompts
from calibration.requests.requests import built_in
from calibration.requests.tasks.image import STEPS, VAE_ENCODER
from runtime.bundle.manifest import MANIFEST, Bundle, Manifest, Source, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Array, Dim, Signature, Tensor
from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.vision.images import encode_image

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-diffusion"
EDGE = 16
CONFIG: dict[str, Any] = {
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "vae": {"scaling_factor": 0.5, "scale_factor": 2, "latent_channels": 4},
    "sizes": {"min": 8, "max": 64, "default": EDGE, "multiple": 4},
}
WORDS = Dim(name="sequence", min=1, opt=32, max=32)
INPUTS: Mapping[str, tuple[Tensor, ...]] = {
    "text_encoder": (Tensor(name="input_ids", dtype="int64", dims=(BATCH, WORDS)),),
    "unet": (
        Tensor(name="sample", dtype="float32", dims=(BATCH, 4, 8, 8)),
        Tensor(name="timestep", dtype="float32", dims=(BATCH,)),
        Tensor(name="encoder_hidden_states", dtype="float32", dims=(BATCH, WORDS, 8)),
    ),
    "vae_decoder": (Tensor(name="latents", dtype="float32", dims=(BATCH, 4, 8, 8)),),
    VAE_ENCODER: (Tensor(name="image", dtype="float32", dims=(BATCH, 3, EDGE, EDGE)),),
}


def _encode(inputs: Mapping[str, Array]) -> dict[str, Array]:
    ids = inputs["input_ids"].astype(np.float32)
    return {"last_hidden_state": np.repeat(ids[..., None], 8, axis=2) / 1000}


def _denoise(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"noise_pred": (inputs["sample"] * np.float32(0.5)).astype(np.float32)}


def _decode(inputs: Mapping[str, Array]) -> dict[str, Array]:
    pixels = np.tanh(inputs["latents"][:, :3].astype(np.float32))
    return {"image": pixels.repeat(2, axis=2).repeat(2, axis=3)}


@pytest.fixture
def drawing(tmp_path: Path) -> LoadedModel:
    """A model that draws, made of functions."""
    root = tmp_path / "drawing"
    shutil.copytree(SAMPLE / "tokenizer", root / "tokenizer")
    submodels = tuple(
        Submodel(
            name=name,
            signature=Signature(inputs=inputs, outputs=()),
            graph=name,
            precision=Precision.parse("float32"),
            nbytes=0,
        )
        for name, inputs in INPUTS.items()
    )
    source = Source(name="drawing", family="fake", architecture="Fake", fingerprint="f" * 64)
    manifest = Manifest(
        name="drawing", key="k", pipeline="diffusion", task="image",
        quant="none", source=source, submodels=submodels, artifacts=(),
        config=CONFIG,
        versions={}, files={},
    )  # fmt: skip
    (root / MANIFEST).write_text(manifest.model_dump_json())
    bundle = Bundle(root)
    functions = {"text_encoder": _encode, "unet": _denoise, "vae_decoder": _decode}
    engines = {name: FakeEngine(function) for name, function in functions.items()}
    return LoadedModel(
        bundle, "image", "fake", "none", engines, DiffusionPipeline.open(bundle.root, bundle.manifest.config)
    )


@pytest.fixture
def chatting(tiny_bundle: Path) -> Iterator[LoadedModel]:
    model = load_model(tiny_bundle, "onnxruntime")
    yield model
    model.close()


def runs(model: LoadedModel) -> int:
    return sum(len(engine.calls) for engine in model.engines.values() if isinstance(engine, FakeEngine))


def saved(found: CalibrationSet, path: Path) -> bytes:
    found.save(path)
    return path.read_bytes()


def test_every_step_is_kept_equally_often(drawing: LoadedModel) -> None:
    found = record(drawing, built_in("image"))
    assert (found.kind, found.fingerprint, found.warnings()) == ("diffusion", "f" * 64, [])
    assert found.settings["requests"] == 8 and found.settings["positions"]["unet"] == [2] * STEPS
    times, counts = np.unique([call["timestep"][0] for call in found.samples["unet"]], return_counts=True)
    assert len(times) == STEPS and set(counts) == {2}
    assert len(found.samples["unet"]) == SAMPLES
    assert (
        len(found.samples["text_encoder"]) == len(found.samples["vae_decoder"]) == len(found.samples[VAE_ENCODER]) == 8
    )
    for submodel in drawing.bundle.manifest.submodels:
        for call in found.samples[submodel.name]:
            submodel.signature.bind(call)


def test_more_requests_give_more_samples_and_a_limit_bounds_them(drawing: LoadedModel) -> None:
    found = record(drawing, built_in("image"), count=12)
    assert len(found.samples["unet"]) == 12 * PER_REQUEST and found.settings["positions"]["unet"] == [3] * STEPS
    few = record(drawing, built_in("image"), limit=5)
    assert {name: len(calls) for name, calls in few.samples.items()} == dict.fromkeys(INPUTS, 5)
    assert few.warnings()[0].startswith("noise levels are not covered: no input of unet at step ")


def test_equal_arguments_give_equal_bytes(drawing: LoadedModel, chatting: LoadedModel, tmp_path: Path) -> None:
    for model in (drawing, chatting):
        one, again, other = (
            saved(record(model, built_in(model.task, seed), seed=seed), tmp_path / "set") for seed in (0, 0, 1)
        )
        assert one == again != other


def test_the_vae_encoder_gets_the_drawn_picture(drawing: LoadedModel) -> None:
    (call,) = record(drawing, built_in("image"), count=1).samples[VAE_ENCODER]
    (latents,) = (found["latents"] for found in record(drawing, built_in("image"), count=1).samples["vae_decoder"])
    assert np.abs(call["image"] - _decode({"latents": latents})["image"]).max() < 1 / 127


def test_the_vae_encoder_gets_the_user_s_pictures(drawing: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, shade in enumerate((0, 255)):
        (folder / f"{i}.png").write_bytes(encode_image(np.full((EDGE * 2, EDGE * 3, 3), shade, np.uint8)))
        (folder / f"{i}.txt").write_text("a small red circle in the center")
    (folder / "long.png").write_bytes(encode_image(np.zeros((1, 60_000, 3), np.uint8)))
    (folder / "long.txt").write_text("a line")
    (folder / "odd.png").write_text("no picture")
    monkey = "runtime.vision.images.MAX_PIXELS"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monkey, 100_000)
        found = record(drawing, read_images(folder, "image"))
    shades = sorted(float(call["image"].mean()) for call in found.samples[VAE_ENCODER])
    assert shades == [-1, 1] and all(call["image"].shape == (1, 3, EDGE, EDGE) for call in found.samples[VAE_ENCODER])
    assert len(found.samples["vae_decoder"]) == 2 and found.settings["requests"] == 2
    assert sorted(reason.split(":")[0] for reason in found.settings["skipped"]) == ["long.png", "odd.png"]
    few, skipped = found.warnings()[:2]
    assert few.startswith("2 requests are few") and skipped.startswith("2 requests were skipped")


def test_nothing_that_can_be_used(drawing: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InvalidInput, match=r"images: none of .* can be used: a\.png: is no PNG"):
        record(drawing, read_images(tmp_path, "image"))
    (tmp_path / "prompts.txt").write_text("word " * 200)
    with pytest.raises(InvalidInput, match=r"prompts: none of prompts\.txt can be used: line 1: prompt: "):
        record(drawing, read_prompts(tmp_path / "prompts.txt", "image"))


def test_no_path_of_this_machine_is_in_a_set(drawing: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a small red circle in the center")
    found = record(drawing, read_prompts(tmp_path / "prompts.txt", "image"), folder=tmp_path / "kept")
    assert str(tmp_path).encode() not in saved(found, tmp_path / "set") and found.settings["file"] == "prompts.txt"


# Decoders


def test_a_recorded_sequence_computes_what_the_decoder_did(chatting: LoadedModel) -> None:
    engine = chatting.engines["decoder"]
    last: list[Array] = []
    original = engine.run
    engine.run = lambda inputs, slot=None: last.append((found := original(inputs, slot))["logits"]) or found  # type: ignore[func-returns-value,method-assign]
    (call,) = record(chatting, built_in("chat"), count=1).samples["decoder"]
    submodel = chatting.bundle.submodel("decoder")
    assert call.keys() == {tensor.name for tensor in submodel.signature.graph_inputs}
    assert len(last) > 1, "a prompt and at least one token of the answer"
    assert call["position_ids"].tolist() == [list(range(call["inputs_embeds"].shape[1]))]
    session = onnxruntime.InferenceSession(chatting.bundle.root / submodel.graph, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], dict(call))
    assert np.abs(logits - last[-1]).max() < 1e-4 * np.abs(logits).max()


# Going on where it was stopped


def test_finished_requests_are_not_run_again(drawing: LoadedModel, tmp_path: Path) -> None:
    unbroken = saved(record(drawing, built_in("image")), tmp_path / "unbroken")

    def stop(done: Done) -> None:
        if done.number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(drawing, built_in("image"), folder=tmp_path / "kept", listen=stop)
    before, reports = runs(drawing), list[Done]()
    found = record(drawing, built_in("image"), folder=tmp_path / "kept", listen=reports.append)
    assert runs(drawing) - before == 5 * (STEPS + 2), "five requests of a text, STEPS noises and a picture"
    assert [done.reused for done in reports if done.seconds is not None] == [True] * 3 + [False] * 5
    assert saved(found, tmp_path / "set") == unbroken


def test_what_is_kept_of_another_capture_is_not_used(drawing: LoadedModel, tmp_path: Path) -> None:
    record(drawing, built_in("image"), count=3, folder=tmp_path / "kept")
    (tmp_path / "kept" / "0001.safetensors").write_bytes(b"damaged")
    reports = list[Done]()
    record(drawing, built_in("image"), count=3, folder=tmp_path / "kept", listen=reports.append)
    assert [done.reused for done in reports if done.seconds is not None] == [True, False, True]
    changes: list[dict[str, Any]] = [{"seed": 1}, {"limit": 6}, {"count": 4}]
    for change in changes:
        reports.clear()
        shutil.copytree(tmp_path / "kept", tmp_path / "copy", dirs_exist_ok=True)
        arguments: dict[str, Any] = {"count": 3} | change
        found = record(drawing, built_in("image"), folder=tmp_path / "copy", listen=reports.append, **arguments)
        assert not any(done.reused for done in reports), change
        assert saved(found, tmp_path / "one") == saved(
            record(drawing, built_in("image"), **arguments), tmp_path / "other"
        )


UNDER_WAY = """
import sys, time
from pathlib import Path
from calibration.capture.data import record
from calibration.requests.requests import built_in
from runtime.placing.loading import load_model
def listen(done):
    if done.number == 4 and done.seconds is None:
        print("ready", flush=True)
        time.sleep(60)
record(load_model(Path(sys.argv[1]), "onnxruntime"), built_in("chat"), folder=Path(sys.argv[2]), listen=listen)
"""


def test_a_killed_capture_goes_on(chatting: LoadedModel, tmp_path: Path) -> None:
    unbroken = saved(record(chatting, built_in("chat")), tmp_path / "unbroken")
    with subprocess.Popen(
        [sys.executable, "-c", UNDER_WAY, str(chatting.bundle.root), str(tmp_path / "kept")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == [f"000{i}.safetensors" for i in range(3)]
    reports = list[Done]()
    found = record(chatting, built_in("chat"), folder=tmp_path / "kept", listen=reports.append)
    assert [done.reused for done in reports if done.seconds is not None] == [True] * 3 + [False] * 5
    assert saved(found, tmp_path / "set") == unbroken
