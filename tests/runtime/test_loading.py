"""From a bundle to a running model: which target is taken and why, and that the whole gives what diffusers and transformers give."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import loading
from runtime.bundle import MANIFEST, Bundle, Submodel
from runtime.engine import Availability, Engine, FakeEngine, Options, targets
from runtime.errors import BundleError, EngineError, EngineUnavailable, NotFound
from runtime.loading import choose_target, load_model
from runtime.pipeline import ImageReady, TextDelta, drive
from runtime.pipelines.chat import ChatRequest
from runtime.pipelines.diffusion import ImageRequest
from runtime.signature import Array
from runtime.text import Message

SAMPLES = Path(__file__).parents[2] / "export" / "samples"
NEAREST_DB = 40.0
STEPS = 8


def changed(bundle: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the bundle with another manifest."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((bundle / MANIFEST).read_bytes()) | changes
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def unusable(name: str, why: str) -> type[Engine]:
    class Unusable(FakeEngine):
        target = name

        @classmethod
        def available(cls) -> Availability:
            return Availability(False, reason=why)

    return Unusable


# Choosing


def test_the_best_usable_target_is_taken(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(tiny_bundle)
    assert choose_target(bundle).target == next(name for name in targets() if name in bundle.targets)
    others = {"openvino": unusable("openvino", "no such processor"), "onnxruntime": targets()["onnxruntime"]}
    monkeypatch.setattr(loading, "targets", lambda: others)
    assert choose_target(bundle).target == "onnxruntime"


def test_when_nothing_fits_every_reason_is_told(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "targets", lambda: {name: unusable(name, f"{name} is broken") for name in ("openvino", "onnxruntime")})
    artifacts = json.loads((tiny_bundle / MANIFEST).read_bytes())["artifacts"]
    bundle = Bundle(changed(tiny_bundle, tmp_path / "b", artifacts=[*artifacts, {"target": "abacus", "submodel": "decoder"}]))
    with pytest.raises(EngineUnavailable) as caught:
        choose_target(bundle)
    for reason in ("openvino is broken", "onnxruntime is broken", "abacus: not known to this program"):
        assert reason in str(caught.value)
    with pytest.raises(EngineUnavailable, match=r"no target of bundle tiny-vlm is usable here\. openvino: openvino is broken$"):
        choose_target(bundle, "openvino")


def test_a_target_is_forced_or_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(tiny_bundle)
    assert choose_target(bundle, "onnxruntime").target == "onnxruntime"
    with pytest.raises(NotFound, match=r"target 'openvin' is not known: did you mean 'openvino'\?"):
        choose_target(bundle, "openvin")
    other = Bundle(changed(tiny_bundle, tmp_path / "b", artifacts=[{"target": "onnxruntime", "submodel": "decoder"}]))
    with pytest.raises(EngineUnavailable, match="was built for onnxruntime, not for openvino: build it with --target openvino"):
        choose_target(other, "openvino")


# Loading


def test_a_bundle_that_needs_another_pipeline(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"needs the pipeline 'chaat', which this program lacks: did you mean 'chat'\?"):
        load_model(changed(tiny_bundle, tmp_path / "b", pipeline="chaat"))


def test_settings_that_do_not_fit(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="settings"):
        load_model(changed(tiny_bundle, tmp_path / "b", config={"context_length": 0}))


def test_what_was_loaded_is_closed_when_a_later_submodel_fails(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = targets()["onnxruntime"]
    closed: list[str] = []
    load = engine.load

    def load_until_the_decoder(submodel: Submodel, root: Path, options: Options) -> Engine:
        if submodel.name == "decoder":
            raise EngineError("out of order")
        loaded: Engine = load(submodel, root, options)
        return loaded

    monkeypatch.setattr(engine, "load", load_until_the_decoder)
    monkeypatch.setattr(engine, "close", lambda self: closed.append(self.submodel.name))
    with pytest.raises(EngineError, match="out of order"):
        load_model(tiny_bundle, "onnxruntime")
    assert closed == ["vision_encoder", "token_embedding"]


def test_an_altered_file_is_not_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    root = changed(tiny_bundle, tmp_path / "b")
    graph = root / "onnx" / "decoder" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    (root / "notes.txt").write_text("a file of the user's own")
    with pytest.raises(BundleError, match=r"is damaged: onnx/decoder/model\.onnx was altered\. "):
        load_model(root)


def test_the_device_is_told(target: str, tiny_bundle: Path) -> None:
    model = load_model(tiny_bundle, target, Options(threads=1))
    assert (model.kind, model.target) == ("chat", target) and model.device.startswith(f"{target}:") and "," not in model.device
    model.close()


# The whole


def psnr(a: Array, b: Array) -> float:
    """Peak signal to noise of uint8 pictures in dB; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.fixture(scope="module")
def noise() -> Array:
    return np.random.default_rng(3).standard_normal((1, 8, 8, 8), np.float32)


PROMPT = "a large red circle at the top left on a white background"


@pytest.fixture(scope="module")
def diffusers_picture(noise: Array) -> Array:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(SAMPLES / "shapes-diffusion", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, latents=torch.from_numpy(noise), output_type="np")
    return np.asarray((drawn.images[0] * 255).round(), np.uint8)


def test_the_same_picture_as_diffusers(
    target: str, diffusion_bundle: Path, noise: Any, diffusers_picture: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(diffusion_bundle, target)
    request = ImageRequest(PROMPT, steps=STEPS, guidance_scale=5.0, latents=noise, seed=0)
    (ready,) = [event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady)]
    model.close()
    figure = psnr(ready.image, diffusers_picture)
    with capsys.disabled():
        print(f"\n{model.device}: {figure:.1f} dB to diffusers' picture from the same noise, contrast {diffusers_picture.std():.0f}")
    assert diffusers_picture.std() > 10 and figure >= NEAREST_DB


def test_a_seed_draws_the_same_picture_again(target: str, diffusion_bundle: Path) -> None:
    model = load_model(diffusion_bundle, target)
    first, second = (
        [
            event.image
            for event in drive(model.pipeline(ImageRequest(PROMPT, steps=2, seed=4)), model.engines)
            if isinstance(event, ImageReady)
        ]
        for _ in range(2)
    )
    model.close()
    np.testing.assert_array_equal(first[0], second[0])


QUESTIONS = 10


@pytest.fixture(scope="module")
def transformers_answers() -> list[tuple[ChatRequest, str]]:
    """Questions about pictures, and what transformers' generate answers greedily."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from calibration.questions import test_questions as draw_questions

    folder = SAMPLES / "shapes-vlm"
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor: Any = LlavaProcessor.from_pretrained(folder)
    answers = []
    for case in draw_questions(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": case.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[case.picture], text=prompt, return_tensors="pt", add_special_tokens="<s>" not in prompt)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        request = ChatRequest((Message("user", (case.picture, case.question)),), max_tokens=40, temperature=0.0)
        answers.append((request, processor.tokenizer.decode(ids, skip_special_tokens=True)))
    return answers


def test_the_same_answers_as_transformers(
    target: str, vlm_bundle: Path, transformers_answers: list[tuple[ChatRequest, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(vlm_bundle, target)
    answers = [
        "".join(event.text for event in drive(model.pipeline(request), model.engines) if isinstance(event, TextDelta))
        for request, _ in transformers_answers
    ]
    model.close()
    wanted = [answer for _, answer in transformers_answers]
    with capsys.disabled():
        same = sum(map(str.__eq__, answers, wanted))
        print(f"\n{model.device}: {same} of {QUESTIONS} answers equal transformers' generate, such as {wanted[0]!r}")
    assert answers == wanted
