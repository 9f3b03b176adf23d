"""From a bundle to a running model: which target is taken and why, and that the whole gives what diffusers and
transformers give.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from runtime.bundle.manifest import MANIFEST, Artifact, Bundle, Manifest, Source, Submodel, sha256
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Array, Dim, Signature, Tensor
from runtime.engine import Availability, Engine, FakeEngine, Options, targets
from runtime.errors import BundleError, EngineError, EngineUnavailable, NotFound, ResourceExhausted
from runtime.language.text import Message
from runtime.pipeline import drive
from runtime.placing import devices, memory, placement, submodels
from runtime.placing.containers import Allowance
from runtime.placing.loading import LoadedModel, choose_target, load_model
from runtime.placing.memory import parse_size
from runtime.placing.placement import PlacementOptions, parse_place
from runtime.tasks.chat import ChatRequest, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest

SAMPLES = Path(__file__).parents[3] / "samples"
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
    monkeypatch.setattr(placement, "targets", lambda: others)
    assert choose_target(bundle).target == "onnxruntime"


def test_when_nothing_fits_every_reason_is_reported(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        placement,
        "targets",
        lambda: {name: unusable(name, f"{name} is broken") for name in ("openvino", "onnxruntime")},
    )
    artifacts = json.loads((tiny_bundle / MANIFEST).read_bytes())["artifacts"]
    bundle = Bundle(
        changed(tiny_bundle, tmp_path / "b", artifacts=[*artifacts, {"target": "abacus", "submodel": "decoder"}])
    )
    with pytest.raises(EngineUnavailable) as caught:
        choose_target(bundle)
    for reason in ("openvino is broken", "onnxruntime is broken", "abacus: not known to this program"):
        assert reason in str(caught.value)
    with pytest.raises(
        EngineUnavailable, match=r"no target of bundle tiny-vlm is usable here\. openvino: openvino is broken$"
    ):
        choose_target(bundle, "openvino")


def test_a_target_is_forced_or_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(tiny_bundle)
    assert choose_target(bundle, "onnxruntime").target == "onnxruntime"
    with pytest.raises(NotFound, match=r"target 'openvin' is not known: did you mean 'openvino'\?"):
        choose_target(bundle, "openvin")
    other = Bundle(changed(tiny_bundle, tmp_path / "b", artifacts=[{"target": "onnxruntime", "submodel": "decoder"}]))
    with pytest.raises(
        EngineUnavailable, match="was built for onnxruntime, not for openvino: build it with --target openvino"
    ):
        choose_target(other, "openvino")


# Loading


def test_a_bundle_whose_task_is_not_that_of_its_pipeline(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has the task 'image', but its pipeline 'chat' is of the task 'chat'"):
        load_model(changed(tiny_bundle, tmp_path / "b", task="image"))


def test_a_bundle_that_needs_another_pipeline(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"needs the pipeline 'chaat', which this program lacks: did you mean 'chat'\?"
    ):
        load_model(changed(tiny_bundle, tmp_path / "b", pipeline="chaat"))


def test_settings_that_do_not_fit(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="settings"):
        load_model(changed(tiny_bundle, tmp_path / "b", config={"context_length": 0}))


def test_what_was_loaded_is_closed_when_a_later_submodel_fails(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_weights_that_are_not_listed_are_not_loaded(tiny_bundle: Path, tmp_path: Path, target: str) -> None:
    root = changed(tiny_bundle, tmp_path / "b", files={})
    with pytest.raises(BundleError, match=r"onnx/decoder/weights\.safetensors is not in the manifest"):
        load_model(root, target)


def test_a_tokenizer_file_that_was_added_is_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    root = changed(tiny_bundle, tmp_path / "b")
    (root / "tokenizer" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer/special_tokens_map\.json is not in the manifest"):
        load_model(root)


def test_what_is_loaded_again_is_what_was_opened(tiny_bundle: Path, tmp_path: Path) -> None:
    root = changed(tiny_bundle, tmp_path / "b")
    bundle = Bundle(root)
    model = load_model(bundle, "onnxruntime")
    assert model.again is not None
    other = model.again(())  # as after a lost device
    other.close()
    manifest = (root / MANIFEST).read_bytes()
    (root / MANIFEST).write_text(json.dumps(json.loads(manifest) | {"name": "other"}))
    with pytest.raises(BundleError, match="holds another bundle than the one that was opened"):
        model.again(())
    with pytest.raises(BundleError, match="holds another bundle than the one that was opened"):
        load_model(bundle, "onnxruntime")
    (root / MANIFEST).write_bytes(manifest)
    weights = root / "onnx" / "decoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        model.again(())
    model.close()


def test_what_changes_while_it_is_loaded_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = changed(tiny_bundle, tmp_path / "b")
    engine: Any = targets()["onnxruntime"]
    load, closed = engine.load, []

    def change_and_load(submodel: Submodel, at: Path, options: Options) -> Engine:
        loaded: Engine = load(submodel, at, options)
        weights = root / "onnx" / submodel.name / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        return loaded

    monkeypatch.setattr(engine, "load", change_and_load)
    monkeypatch.setattr(engine, "close", lambda self: closed.append(self.submodel.name))
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        load_model(root, "onnxruntime")
    assert closed == ["vision_encoder"]


def test_a_shape_that_is_compiled_later_reads_what_was_verified(tiny_bundle: Path, tmp_path: Path) -> None:
    root = changed(tiny_bundle, tmp_path / "b")
    calls: list[str] = []

    def verify() -> None:
        calls.append("verified")
        Bundle(root).verify(unknown=False)

    submodel = Bundle(root).submodel("decoder")
    engine = targets()["onnxruntime"].load(submodel, root, Options(verify=verify))
    assert calls == ["verified"]
    engine.close()


def test_the_device_is_reported(target: str, tiny_bundle: Path) -> None:
    model = load_model(tiny_bundle, target, Options(threads=1))
    assert (
        (model.task, model.target) == ("chat", target)
        and model.device.startswith(f"{target}:")
        and "," not in model.device
    )
    model.close()


# Places


class Plain(FakeEngine):
    """An engine that gives zeros. Whether it can be loaded, whether it runs and what it leaves to others, a
    test says.
    """

    target = "plain"
    rank = 1
    failure: ClassVar[Exception | None] = None
    lost: ClassVar[bool] = False
    left: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def available(cls) -> Availability:
        return Availability(True, ("CPU",))

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        if cls.failure is not None and submodel.name == "unet":
            raise cls.failure

        def zeros(inputs: Mapping[str, Array]) -> dict[str, Array]:
            if cls.lost:
                raise EngineError("the device is gone")
            return {"image": np.zeros((1, 3, 8, 8), np.float32)}

        engine = cls(zeros)
        engine.submodel, engine.device, engine.fallbacks = submodel, f"{cls.target}:{options.device}", cls.left
        return engine


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, type[Plain], type[Plain]]:
    """A diffusion bundle without graphs, and two targets that it was built for: "quick", on a device of its own, and
    "slow".
    """

    class Quick(Plain):
        target = "quick"

        @classmethod
        def available(cls) -> Availability:
            return Availability(True, ("cuda:0 (made up)",))

    class Slow(Plain):
        target = "slow"

    known = {"quick": Quick, "slow": Slow}
    for module, name in ((placement, "targets"), (placement, "target"), (submodels, "target")):
        monkeypatch.setattr(module, name, (lambda: known) if name == "targets" else known.__getitem__)
    latents = Tensor(name="latents", dtype="float32", dims=(BATCH, 8, Dim(name="height", min=2, opt=8, max=64), 8))
    parts = tuple(
        Submodel(
            name=name,
            signature=Signature(inputs=(latents,), outputs=()),
            graph="g",
            precision=Precision.parse("int8"),
            nbytes=size,
        )
        for name, size in (("text_encoder", 10), ("unet", 30), ("vae_decoder", 20))
    )
    config, root = json.loads(json.dumps(CONFIG)), tmp_path / "made-up"
    shutil.copytree(SAMPLES / "shapes-diffusion" / "tokenizer", root / "tokenizer")
    files = {f"tokenizer/{path.name}": sha256(path) for path in (root / "tokenizer").iterdir()}
    manifest = Manifest(
        name="made-up", key="", pipeline="diffusion", task="image",
        quant="none", submodels=parts, config=config, versions={},
        files=files,
        artifacts=tuple(Artifact(target=name, submodel=one.name) for name in known for one in parts),
        source=Source(name="made-up", family="f", architecture="A", fingerprint=""),
    )  # fmt: skip
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return root, Quick, Slow


CONFIG: Mapping[str, Any] = {
    "scheduler": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
    "vae": {"scaling_factor": 1.0, "scale_factor": 16, "latent_channels": 8},
    "sizes": {"min": 64, "max": 1024, "default": 128, "multiple": 32},
}  # fmt: skip


@pytest.mark.parametrize(
    "failure", [ResourceExhausted("cuda:0 has too little free memory"), EngineError("made for another GPU")]
)
def test_what_cannot_be_loaded_is_loaded_on_the_next_place_and_reported(two: Any, failure: Exception) -> None:
    root, quick, _ = two
    quick.failure = failure
    model = load_model(root)
    assert {name: engine.device for name, engine in model.engines.items()} == {
        "text_encoder": "quick:cuda:0", "unet": "slow:CPU", "vae_decoder": "quick:cuda:0",
    }  # fmt: skip
    assert (model.target, model.device) == ("quick, slow", "quick:cuda:0, slow:CPU")
    assert model.notes == (f"unet is on slow:CPU since it could not be loaded elsewhere (quick:cuda:0: {failure})",)


def test_where_nothing_can_be_loaded_every_reason_is_reported(two: Any) -> None:
    root, quick, slow = two
    quick.failure, slow.failure = ResourceExhausted("too little memory"), EngineError("out of order")
    with pytest.raises(
        EngineUnavailable,
        match=r"unet could be loaded nowhere\. quick:cuda:0: too little memory; slow:CPU: out of order",
    ):
        load_model(root)
    with pytest.raises(ResourceExhausted, match=r"^too little memory$"):
        load_model(root, "quick")


def test_strict_refuses_what_runs_elsewhere(two: Any) -> None:
    root, quick, _ = two
    quick.left = ("3 of 120 nodes on the CPU: Loop",)
    assert load_model(root).engines["unet"].fallbacks == quick.left
    with pytest.raises(
        EngineError, match="text_encoder on quick:cuda:0 runs a part elsewhere: 3 of 120 nodes on the CPU: Loop"
    ):
        load_model(root, placing=PlacementOptions(strict=True))
    assert (
        load_model(
            root, placing=PlacementOptions(strict=True, place=dict.fromkeys(("text_encoder", "unet", "vae"), "slow"))
        ).target
        == "slow"
    )


def test_a_lost_device_is_found_and_left(two: Any) -> None:
    root, quick, slow = two
    model = load_model(root)
    assert model.broken() == ()
    quick.lost = True
    assert model.broken() == ("text_encoder", "unet", "vae_decoder")
    moved = model.elsewhere(model.broken())
    assert (moved.target, moved.device, moved.broken()) == ("slow", "slow:CPU", ())
    slow.lost, quick.lost = True, False
    assert moved.elsewhere(moved.broken()).target == "quick", "what came back is used again"


def test_the_limit_of_a_container_reaches_the_engines(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        Plain,
        "load",
        classmethod(lambda cls, submodel, root, options: seen.append(options.threads) or FakeEngine(lambda x: {})),
    )
    monkeypatch.setattr(devices, "allowance", lambda: Allowance(0.5))
    load_model(two[0])
    load_model(two[0], options=Options(threads=3))
    assert set(seen[:3]) == {1} and set(seen[3:]) == {3}


def draw(model: LoadedModel, size: int, steps: int = 2) -> Any:
    request = ImageRequest(PROMPT, width=size, height=size, steps=steps, seed=4)
    (ready,) = [event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady)]
    return ready.image


def both_cpu_targets() -> bool:
    return all(targets()[name].available().usable for name in ("openvino", "onnxruntime"))


@pytest.mark.skipif(not both_cpu_targets(), reason="needs OpenVINO and ONNX Runtime")
def test_submodels_on_different_targets_draw_the_same_picture(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = load_model(diffusion_bundle, "openvino", Options(threads=1))
    whole = draw(alone, 128, STEPS)
    alone.close()
    mixed = load_model(
        diffusion_bundle,
        options=Options(threads=1),
        placing=PlacementOptions(place=parse_place("text_encoder=onnxruntime,unet=openvino")),
    )
    figure = psnr(draw(mixed, 128, STEPS), whole)
    targets_used = {name: engine.target for name, engine in mixed.engines.items()}
    mixed.close()
    with capsys.disabled():
        print(f"\n{targets_used}: {figure:.1f} dB to OpenVINO alone")
    assert (targets_used["text_encoder"], targets_used["unet"]) == ("onnxruntime", "openvino") and figure >= 50


@pytest.mark.skipif(memory.of_process() is None, reason="the system does not tell what a process has")
def test_under_a_limit_engines_take_turns_and_pictures_come_in_tiles(
    target: str, diffusion_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = load_model(diffusion_bundle, target, Options(threads=1))
    whole = draw(free, 512)
    free.close()
    lines = []
    for limit in ("400MB", "130MB"):
        model = load_model(
            diffusion_bundle, target, Options(threads=1), PlacementOptions(memory_limit=parse_size("", limit))
        )
        picture: Any = draw(model, 512)
        engines: Any = model.engines
        tiled = model.pipeline.decoder.most < 32 * 32  # type: ignore[attr-defined]
        loads = {name: engine.loads for name, engine in engines.items() if name != "vae_encoder"}
        again = sum(engine.reload_seconds for engine in engines.values())
        taken = sum(engine.taken for engine in engines.values())
        figure = psnr(picture, whole)
        lines.append(
            f"{target} within {limit}: {figure:.1f} dB, {'in tiles' if tiled else 'whole'}, loads {loads}, {again:.2f} "
            "s again"
        )
        model.close()
        assert taken <= parse_size("", limit) and (figure >= 33 if tiled else figure == math.inf)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert "in tiles" in lines[1] and "whole" in lines[0]


def test_a_limit_too_small_for_a_submodel(diffusion_bundle: Path) -> None:
    with pytest.raises(ResourceExhausted, match=r"no device has enough memory for unet.*needs .*MiB, has 19\.1 MiB"):
        load_model(diffusion_bundle, placing=PlacementOptions(memory_limit=20_000_000))


def test_a_conversation_under_a_limit(target: str, vlm_bundle: Path) -> None:
    """The decoder's caches stay while it answers, though vision encoder and embedding come and go."""
    request = ChatRequest(
        (Message("user", (np.full((128, 128, 3), 200, np.uint8), "what color is the background?")),),
        max_tokens=8,
        temperature=0.0,
    )

    def answer(placing: PlacementOptions) -> str:
        model = load_model(vlm_bundle, target, Options(threads=1), placing)
        text = "".join(
            event.text for event in drive(model.pipeline(request), model.engines) if isinstance(event, TextDelta)
        )
        model.close()
        return text

    assert answer(PlacementOptions(memory_limit=110_000_000)) == answer(PlacementOptions()) != ""


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
    drawn = pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, latents=torch.from_numpy(noise), output_type="np"
    )
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
        print(
            f"\n{model.device}: {figure:.1f} dB to diffusers' picture from the same noise, contrast "
            f"{diffusers_picture.std():.0f}"
        )
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

    from samples.world.questions import test_questions as draw_questions

    folder = SAMPLES / "shapes-vlm"
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor: Any = LlavaProcessor.from_pretrained(folder)
    answers = []
    for case in draw_questions(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": case.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(
            images=[case.picture], text=prompt, return_tensors="pt", add_special_tokens="<s>" not in prompt
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        request = ChatRequest((Message("user", (case.picture, case.question)),), max_tokens=40, temperature=0.0)
        answers.append((request, processor.tokenizer.decode(ids, skip_special_tokens=True)))
    return answers


def test_the_same_answers_as_transformers(
    target: str,
    vlm_bundle: Path,
    transformers_answers: list[tuple[ChatRequest, str]],
    capsys: pytest.CaptureFixture[str],
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
