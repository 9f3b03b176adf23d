"""Stable Diffusion XL from its checkpoint to the picture, on every engine, against diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import export.cli.commands
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.source import Source, resolve
from export.families.stable_diffusion import Grid
from export.family import family_of
from profiles.probes import probes
from profiles.subjects import source_subject
from profiles.tasks.image import PictureExam
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig, Sizes
from runtime.diffusion.variation import random_stream
from runtime.errors import BundleError, EnginecastError, InvalidInput, NotFound, SourceError, UnsupportedModel
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.image import ImageReady, ImageRequest
from samples.exams import Pictures
from tests.fakes.captured import captured
from tests.runtime.pipelines.test_canvas import HEIGHT, MASK, WIDTH, library, request_of
from tests.runtime.pipelines.test_diffusion import psnr

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # torch tensors inside diffusers
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
EDGE = 16
REQUEST = ImageRequest("a large red circle", "", EDGE, 24, steps=4, guidance_scale=4.0, seed=3)
REQUESTS = {
    "no negative prompt": REQUEST,
    "a negative prompt": replace(REQUEST, negative_prompt="blue square"),
    "no guidance": replace(REQUEST, guidance_scale=1.0),
    "an empty prompt": replace(REQUEST, prompt=""),
    "a size that the UNet does not divide evenly": replace(REQUEST, width=22, height=18),
    "stated sizes": replace(REQUEST, original_size=(512, 768), crop_top_left=(100, 7), target_size=(1024, 900)),
    "sizes of the negative prompt": replace(
        REQUEST, original_size=(512, 768), crop_top_left=(100, 7), target_size=(1024, 900),
        negative_original_size=(99, 700), negative_crop_top_left=(1, 300), negative_target_size=(30, 2000),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tiny_xl: Path) -> Any:
    """diffusers' pipeline on the checkpoint, in float32."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_xl, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it demands multiples of 8 pixels whatever the VAE's factor
    return pipe


@pytest.fixture(scope="module")
def loaded(xl_bundle: Path) -> Iterator[dict[str, LoadedModel]]:
    """The bundle by target, each loaded once."""
    models: dict[str, LoadedModel] = {}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture
def ours(xl_bundle: Path, loaded: dict[str, LoadedModel], target: str) -> LoadedModel:
    if target not in loaded:
        loaded[target] = load_model(xl_bundle, target)
    return loaded[target]


def drawn(model: LoadedModel, request: ImageRequest) -> Array:
    (ready,) = (event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady))
    return ready.image


def expected(pipe: Any, request: ImageRequest) -> Array:
    """What diffusers draws from the same noise; to it, no negative prompt is None."""
    assert request.width is not None and request.height is not None and request.seed is not None
    noise = random_stream(request.seed).standard_normal((1, 4, request.height // 2, request.width // 2), np.float32)
    stated = {
        "original_size": request.original_size,
        "crops_coords_top_left": request.crop_top_left,
        "target_size": request.target_size,
        "negative_original_size": request.negative_original_size,
        "negative_crops_coords_top_left": request.negative_crop_top_left,
        "negative_target_size": request.negative_target_size,
    }
    images = pipe(
        request.prompt, negative_prompt=request.negative_prompt or None, num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale, width=request.width, height=request.height,
        latents=torch.from_numpy(noise),
        output_type="np", **{name: pair for name, pair in stated.items() if pair},
    ).images  # fmt: skip
    return np.asarray(np.round(images[0] * 255), np.uint8)


@pytest.mark.parametrize("case", REQUESTS)
def test_the_same_picture_as_diffusers(theirs: Any, ours: LoadedModel, case: str) -> None:
    wanted, got = expected(theirs, REQUESTS[case]), drawn(ours, REQUESTS[case])
    differ = np.abs(wanted.astype(int) - got.astype(int))
    print(f"{ours.target}, {case}: {(differ > 0).sum()} of {differ.size} values differ, at most by {differ.max()}")
    assert wanted.std() > 20 and differ.max() <= 1 and (differ > 0).mean() < 0.02
    if REQUESTS[case] is not REQUEST:
        usual = expected(theirs, REQUEST)
        assert usual.shape != wanted.shape or (wanted != usual).mean() > 0.02  # the model heeds what is compared


def test_the_same_picture_drawn_on_another_as_in_diffusers(
    theirs: Any, ours: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, request, more in (
        ("StableDiffusionXLImg2ImgPipeline", request_of("euler", strength=0.5), {}),
        ("StableDiffusionXLInpaintPipeline", request_of("euler", strength=1.0, mask=MASK, keep_unmasked=False),
            {"mask_image": Image.fromarray(MASK).convert("L"), "height": HEIGHT, "width": WIDTH}),
    ):  # fmt: skip
        pipe = getattr(diffusers, kind)(**theirs.components, add_watermarker=False)
        wanted = library(pipe, request, monkeypatch, **more)
        assert wanted.std() > 10 and psnr(drawn(ours, request), wanted) >= 40


LONG = "a large (red:9) circle under " + "the [small] blue square " * 9
PIECES = [
    ("a large ", 1.0), ("red", 9.0), (" circle under the ", 1.0),
    *[piece for _ in range(8) for piece in (("small", 1 / 1.1), (" blue square the ", 1.0))],
    ("small", 1 / 1.1), (" blue square ", 1.0),
]  # fmt: skip
"""The prompt, and its texts with their weights, written by hand."""


def weighted(pipe: Any, pieces: list[tuple[str, float]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and pooled text of `count` chunks by diffusers' own encoders, weighted as A1111's web UI documents:
    each chunk is encoded alone, its states are multiplied, and its mean is restored.
    """
    found, pooled = [], torch.empty(0)
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        room = tokenizer.model_max_length - 2
        flat = [(i, weight) for text, weight in pieces for i in tokenizer(text, add_special_tokens=False).input_ids]
        rows = [flat[start : start + room] for start in range(0, count * room, room)]
        states = []
        for row in rows:
            ids = [tokenizer.bos_token_id, *(i for i, _ in row), tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (room + 2 - len(ids))
            weights = torch.tensor([1.0, *(weight for _, weight in row)] + [1.0] * (room + 1 - len(row)))
            with torch.inference_mode():
                outputs = encoder(torch.tensor([ids]), output_hidden_states=True)
            before = outputs.hidden_states[-2]
            after = before * weights[None, :, None]
            states.append(after * (before.mean() / after.mean()))
            pooled = outputs[0] if len(states) == 1 else pooled
        found.append(torch.cat(states, 1))
    return torch.cat(found, 2), pooled


@pytest.mark.parametrize("negative", [[], [("blue", 1.0)]])
def test_weighted_prompts_of_several_chunks(theirs: Any, ours: LoadedModel, negative: list[tuple[str, float]]) -> None:
    """The negative prompt is shorter: empty chunks follow it."""
    request = replace(REQUEST, prompt=LONG, negative_prompt="".join(text for text, _ in negative), prompt_weights=True)
    states, pooled = weighted(theirs, PIECES, 2)
    others, other = weighted(theirs, negative, 2) if negative else (torch.zeros_like(states), torch.zeros_like(pooled))
    noise = random_stream(3).standard_normal((1, 4, 12, 8), np.float32)
    images = theirs(
        prompt_embeds=states, pooled_prompt_embeds=pooled, negative_prompt_embeds=others,
        negative_pooled_prompt_embeds=other, num_inference_steps=4, guidance_scale=4.0, width=EDGE, height=24,
        latents=torch.from_numpy(noise), output_type="np",
    ).images  # fmt: skip
    wanted, got = np.round(images[0] * 255).astype(int), drawn(ours, request).astype(int)
    assert wanted.std() > 20 and np.abs(wanted - got).max() <= 1 and (wanted != got).mean() < 0.02
    assert (wanted != drawn(ours, replace(request, prompt=LONG.replace(":9", ":1")))).mean() > 0.02


def test_the_model_s_own_size_and_guidance_are_diffusers(theirs: Any, xl_bundle: Path) -> None:
    config = DiffusionConfig.parse(Bundle(xl_bundle).manifest.config)
    assert config.sizes.default == theirs.default_sample_size * theirs.vae_scale_factor
    assert (config.sampler, config.defaults.guidance_scale) == ("euler", 5.0)
    assert config.added is not None and config.added.force_zeros_for_empty_prompt


def test_the_published_shape_draws_1024_pixels(tmp_path: Path) -> None:
    source = Source(tmp_path, "xl", "diffusers", "StableDiffusionXLPipeline")
    grid = Grid.of(
        source,
        {"sample_size": 128, "block_out_channels": (320, 640, 1280)},
        {"block_out_channels": (128, 256, 512, 512)},
    )
    assert grid.sizes == Sizes(min=32, max=4096, default=1024, multiple=8)


def test_a_bundle_of_faithful_parts(xl_bundle: Path) -> None:
    bundle = Bundle(xl_bundle)
    bundle.verify()
    assert tuple(submodel.name for submodel in bundle.manifest.submodels) == PARTS
    for submodel in bundle.manifest.submodels:
        assert submodel.parity is not None and submodel.parity.method == "full" and submodel.parity.error < 1e-5
        assert str(submodel.precision) == "float16"
    assert {path.parent.name for path in xl_bundle.glob("tokenizer*/*")} == {"tokenizer", "tokenizer_2"}


def test_layers_that_nothing_reads_are_not_built(xl_bundle: Path) -> None:
    """The last layer and norm of the first encoder lie behind its penultimate state."""
    first, second = (load_file(xl_bundle / "onnx" / name / "weights.safetensors") for name in PARTS[:2])
    assert not any("layers.1" in name or "final_layer_norm" in name for name in first)
    assert any("layers.1" in name for name in second)


@pytest.mark.full
def test_parity_with_the_twin(tiny_xl: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(tiny_xl), tmp_path / "b", parity="twin"))
    for submodel in bundle.manifest.submodels:
        assert submodel.parity is not None and submodel.parity.method == "twin" and submodel.parity.error < 1e-4


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_overflows_float16_says_so(tiny_xl: Path, tmp_path: Path, upcast: bool) -> None:
    source = edited(tiny_xl, tmp_path, "vae/config.json", {"force_upcast": upcast})
    allowed = {part.name: part.float16 for part in family_of(resolve(str(source))).parts(resolve(str(source)), False)}
    assert allowed == dict.fromkeys(PARTS[:3], True) | dict.fromkeys(PARTS[3:], not upcast)


@pytest.mark.full
def test_what_of_a_vae_overflows_is_measured_whatever_its_config_says(tiny_xl: Path, tmp_path: Path) -> None:
    """A residual stream of 1e5 and more between norms, as in the published VAE, and force_upcast false."""
    source = edited(tiny_xl, tmp_path, "vae/config.json", {"force_upcast": False})
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.bias"] += 60_000 * torch.linspace(-1, 1, len(state["decoder.conv_in.bias"]))
    save_file(state, file, metadata={"format": "pt"})
    options = Options(str(source), tmp_path / "b", targets=("onnxruntime",), quant="fp16", quality="none")
    bundle, _ = build(options)
    decoder = bundle.submodel("vae_decoder")
    assert decoder.precision.compute == "float16"
    assert {"decoder.conv_in/Conv", "decoder.mid_block.resnets.0/Add"} <= set(decoder.keep)
    assert not any("mid_block" in node for node in bundle.submodel("unet").keep)


def test_old_names_are_the_same_byte_for_byte(tiny_xl: Path, xl_bundle: Path, tmp_path: Path) -> None:
    """As the published text encoders have them."""
    source = Path(shutil.copytree(tiny_xl, tmp_path / "old"))
    for part in PARTS[:2]:
        file = source / part / "model.safetensors"
        state = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
        named = {
            name if name.startswith("text_projection") else f"text_model.{name}": tensor
            for name, tensor in state.items()
        }
        save_file(named, file, metadata={"format": "pt"})
    build(Options(str(source), tmp_path / "b"))
    for file in (xl_bundle / "onnx").rglob("*.safetensors"):
        assert (tmp_path / "b" / file.relative_to(xl_bundle)).read_bytes() == file.read_bytes(), file


@pytest.mark.full
def test_int8_draws(tiny_xl: Path, tmp_path: Path) -> None:
    bundle, timings = build(Options(str(tiny_xl), tmp_path / "b", quant="int8", allow_low_quality=True))
    assert "calibrate" in timings and "W8A8" in str(bundle.submodel("unet").precision)
    model = load_model(tmp_path / "b")
    assert drawn(model, REQUEST).std() > 20
    model.close()


def test_a_build_from_the_command_line(
    tiny_xl: Path, xl_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", tiny_xl, "--output", tmp_path / "b", "--target", "onnxruntime", "--target", "openvino"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    try:
        export.cli.commands.main()
    except SystemExit as ended:
        assert not ended.code
    shown = "".join(capfd.readouterr())
    assert all(f"{part} " in shown for part in PARTS) and str(tmp_path / "b") in shown
    assert Bundle(tmp_path / "b").manifest.config == Bundle(xl_bundle).manifest.config


# What else uses the pipeline


def test_a_bundle_is_measured_and_captured(ours: LoadedModel) -> None:
    found = {probe.metric: probe for probe in probes(ours, {"width": EDGE, "height": EDGE, "steps": 1})}
    assert set(found) == {*PARTS, "picture"}
    assert found["unet"].settings["time_ids"] == "2x6" and all(probe.run() > 0 for probe in found.values())
    samples = captured(ours, limit=2)
    assert samples["unet"][0].keys() == {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}
    assert all(samples[part] for part in PARTS)


def test_the_checkpoint_itself_can_be_scored(tiny_xl: Path, theirs: Any) -> None:
    cases = Pictures().cases(2)
    (first, _) = source_subject(tiny_xl).results(cases, PictureExam(count=2, steps=2, guidance_scale=3.0, batch=2))
    prompt = cases[0].request.prompt
    wanted = expected(theirs, ImageRequest(prompt, "", EDGE, EDGE, steps=2, guidance_scale=3.0, seed=0))
    assert np.abs(first.astype(int) - wanted.astype(int)).max() <= 1


# Requests


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("original_size", {"original_size": (512, -1)}),
        ("crop_top_left", {"crop_top_left": (0, 70_000)}),
        ("target_size", {"target_size": (512,)}),
        ("prompt", {"prompt": "red " * 40}),
        ("negative_prompt", {"negative_prompt": "red " * 40}),
    ],
)
def test_bad_requests_name_the_field(xl_bundle: Path, field: str, change: dict[str, Any]) -> None:
    pipeline = DiffusionPipeline.open(xl_bundle, Bundle(xl_bundle).manifest.config)
    with pytest.raises(InvalidInput) as caught:
        pipeline(replace(REQUEST, **change))
    assert caught.value.field == field


# Checkpoints that cannot be built


def edited(source: Path, tmp_path: Path, name: str, change: dict[str, Any]) -> Path:
    """A copy of a checkpoint with other values in one of its JSON files."""
    copy = Path(shutil.copytree(source, tmp_path / "edited"))
    file = copy / name
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    return copy


def removed(name: str) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        path = source / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tokenizer_2", NotFound, r"tokenizer_2 does not exist: a StableDiffusionXLPipeline needs it\. Download"),
        ("tokenizer", NotFound, r"tokenizer does not exist: .* Download"),
        ("scheduler", NotFound, r"scheduler does not exist|scheduler_config\.json does not exist"),
        ("tokenizer_2/tokenizer_config.json", SourceError,
            r"tokenizer_2/tokenizer_config\.json cannot be read .*: copy the tokenizer"),
        ("text_encoder_2", NotFound, r"text_encoder_2/config\.json does not exist: download"),
        ("text_encoder_2/model.safetensors", NotFound, r"text_encoder_2 has no weights: expected"),
        ("unet/config.json", NotFound, r"unet/config\.json does not exist"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    tiny_xl: Path, tmp_path: Path, name: str, error: type[EnginecastError], message: str
) -> None:
    source = Path(shutil.copytree(tiny_xl, tmp_path / "copy"))
    removed(name)(source)
    with pytest.raises(error, match=message):
        _ = Build.open(Options(str(source), tmp_path / "b")).key


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("unet/config.json", {"addition_embed_type": None}, UnsupportedModel,
            r"addition_embed_type None \(expected 'text_time'\).* Take"),
        ("unet/config.json", {"in_channels": 8}, UnsupportedModel, r"in_channels 8 \(expected 4\)"),
        ("text_encoder_2/config.json", {"hidden_size": 32}, UnsupportedModel, r"width 40 .* the text encoders give 48"),
        ("text_encoder_2/config.json", {"projection_dim": 24}, UnsupportedModel,
            r"embeddings_input_dim 60 \(expected 72\)"),
        ("text_encoder_2/config.json", {"vocab_size": 7}, SourceError,
            r"text_encoder_2 cannot take .* expected numbers below 7"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, UnsupportedModel, r"latents_mean"),
        ("vae/config.json", {"scaling_factor": 0}, SourceError, r"vae\.scaling_factor 0: .* Correct them"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 99}, SourceError,
            r"tokenizer_2 makes prompts of 99 .* at most 32"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 20}, SourceError,
            r"\(tokenizer 32, tokenizer_2 20 tokens\)\. Download"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, UnsupportedModel, r"beta_schedule"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "maybe"}, SourceError,
            r"force_zeros_for_empty_prompt 'maybe'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tiny_xl: Path, tmp_path: Path, name: str, change: dict[str, Any], error: type[EnginecastError], message: str
) -> None:
    source = edited(tiny_xl, tmp_path, name, change)
    with pytest.raises(error, match=message):
        state = Build.open(Options(str(source), tmp_path / "b"))
        _ = state.key
        [state.weights(part) for part in state.parts]


def test_a_bundle_whose_tokenizers_differ_is_refused(xl_bundle: Path, tmp_path: Path) -> None:
    bundle = edited(xl_bundle, tmp_path, "tokenizer_2/tokenizer_config.json", {"model_max_length": 20})
    with pytest.raises(BundleError, match=r"differ in how many tokens .*tokenizer_2 20\), expected the same"):
        DiffusionPipeline.open(bundle, Bundle(bundle).manifest.config)
