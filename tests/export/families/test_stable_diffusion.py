"""What of a Stable Diffusion checkpoint is read as diffusers' pipeline reads it, and what is refused from its small
files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import enginecast
import export.cli.commands
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.bundle.manifest import Bundle
from runtime.diffusion.config import DiffusionConfig
from runtime.errors import InvalidInput, SourceError
from runtime.pipeline import Call
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import load_model
from runtime.tasks.image import ImageRequest
from tests.runtime.pipelines.test_canvas import HEIGHT, MASK, TARGETS, WIDTH, drawn, library, request_of
from tests.runtime.pipelines.test_diffusion import psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # torch tensors inside diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers says what it corrects in old files
]

INDEX = "model_index.json"
UNET, VAE, TEXT = (f"{name}/config.json" for name in ("unet", "vae", "text_encoder"))
SCHEDULER = "scheduler/scheduler_config.json"
Edit = Callable[[str, dict[str, Any]], Path]


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change fields of a JSON file; those that are None are removed."""
    content = json.loads((folder / file).read_bytes()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def set_scheduler(folder: Path, class_name: str, **fields: Any) -> None:
    edit(folder, INDEX, scheduler=["diffusers", class_name])
    edit(folder, SCHEDULER, _class_name=class_name, **fields)


@pytest.fixture
def copy(tiny_diffusion: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_diffusion, tmp_path / "model"))


def opened(folder: Path) -> Build:
    return Build.open(Options(str(folder), folder.parent / "bundle"))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        (UNET, {"num_class_embeds": 4}, "num_class_embeds 4, expected None: it takes class labels"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        (UNET, {"dual_cross_attention": True}, "dual_cross_attention True"),
        (UNET, {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj'"),
        (UNET, {"encoder_hid_dim": 16, "encoder_hid_dim_type": "ip_image_proj"}, "it takes features of a picture"),
        (UNET, {"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        (UNET, {"out_channels": 8}, r"out_channels 8 \(expected 4\)"),
        (UNET, {"cross_attention_dim": 48}, "expects hidden states of width 48 .* the text encoders give 16"),
        (UNET, {"cross_attention_dim": [16, 48]}, "hidden states of width 16, 48"),
        (UNET, {"sample_size": [8, 16]}, r"sample_size \[8, 16\], expected one number"),
        (UNET, {"sample_size": None}, "sample_size None, expected one number"),
        (UNET, {"_diffusers_version": "main"}, "_diffusers_version 'main'"),
        (UNET, {"_class_name": "UNet2DModel"}, "is of the kind UNet2DModel, expected UNet2DConditionModel"),
        (UNET, {"num_attention_heads": 4}, "number of attention heads .* Correct them"),
        (UNET, {"attention_type": "gated"}, "attention_type 'gated', expected 'default': its attention takes boxes"),
        (UNET, {"attention_type": "glow"}, "attention_type 'glow', expected 'default'"),
        (UNET, {"act_fn": "glow"}, "activation function glow not found in .*'silu'.* Correct them"),
        (UNET, {"down_block_types": ["GlowBlock2D", "DownBlock2D"]}, r"GlowBlock2D does not exist.\). Correct them"),
        (VAE, {"act_fn": "glow"}, "activation function glow not found"),
        (TEXT, {"hidden_act": "glow"}, r"KeyError: the library knows no 'glow'\). Correct them"),
        (VAE, {"_class_name": "AsymmetricAutoencoderKL"}, "is of the kind Asymm.*, expected AutoencoderKL"),
        (VAE, {"out_channels": 4}, "out_channels 4, expected 3"),
        (TEXT, {"model_type": "bert", "architectures": ["BertModel"]}, "is of the kind bert, expected clip_text_model"),
        (TEXT, {"use_attention_mask": True}, "use_attention_mask True"),
        (
            INDEX,
            {"vae": ["diffusers", "AutoencoderDC"]},
            "vae is of the class AutoencoderDC, expected AutoencoderKL",
        ),
        (INDEX, {"text_encoder": ["transformers", "BertModel"]}, "text_encoder is of the class BertModel"),
        (INDEX, {"text_encoder": [None, None]}, "names no text_encoder, expected CLIPTextModel"),
        (INDEX, {"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer is of the class T5Tokenizer"),
        (INDEX, {"unet": ...}, "names no unet"),
        (INDEX, {"scheduler": [None, None]}, "names no scheduler"),
        (INDEX, {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDMEulerScheduler is for models with EDM"),
        (SCHEDULER, {"_class_name": "IPNDMScheduler"}, "IPNDMScheduler is for models with a continuous"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        (SCHEDULER, {"thresholding": True}, "thresholding True"),
    ],
)
def test_what_the_pipeline_does_not_serve_is_refused_from_the_small_files(
    copy: Path, file: str, change: dict[str, Any], named: str
) -> None:
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()  # no work was begun
    edit(copy, file, **change)
    with pytest.raises(SourceError, match=named) as caught:
        opened(copy)
    assert "ownload" not in str(caught.value), "the files are as published"


def test_entries_without_a_class_are_no_fault(copy: Path) -> None:
    edit(copy, INDEX, safety_checker=[None, None], feature_extractor=[None, None], image_encoder=...)
    assert opened(copy).family.notes(resolve(str(copy))) == ()


def with_variant(folder: Path, name: str) -> None:
    """Save the UNet and the VAE in a variant as well, with other values."""
    for component in ("unet", "vae"):
        file = folder / component / "diffusion_pytorch_model.safetensors"
        state = {key: value + 1 for key, value in load_file(file).items()}
        save_file(state, file.with_suffix(f".{name}.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_variant_is_that_of_diffusers(copy: Path, variant: str) -> None:
    """Networks that lack it are read plain, with a note."""
    with_variant(copy, "fp16")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy, variant=variant or None)
    build = Build.open(Options(str(copy), copy.parent / "bundle", variant=variant))
    for part in build.parts:
        (component,) = part.components
        wanted = getattr(theirs, component.folder).state_dict()
        for name, ref in build.weights(part).items():
            np.testing.assert_array_equal(ref.array(), wanted[name].half().numpy())
    assert build.notes == (("text_encoder has no variant fp16: its plain weights are read",) if variant else ())


def test_a_folder_with_variants_only_says_so(copy: Path) -> None:
    for component in ("unet", "vae"):
        file = copy / component / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".non_ema.safetensors"))
    assert opened(copy).notes == tuple(
        f"{name} has no weights but those of the variant non_ema, which are read" for name in ("unet", "vae")
    )
    with pytest.raises(InvalidInput, match="no weights of the variant 'fp16', there are non_ema"):
        Build.open(Options(str(copy), copy.parent / "bundle", variant="fp16"))


@pytest.mark.parametrize(("version", "edge"), [("0.8.1", 64), ("0.9.0.dev0", 8), ("0.10.0", 8), (..., 8)])
def test_the_size_of_an_old_unet_is_that_of_diffusers(copy: Path, version: Any, edge: int) -> None:
    edit(copy, UNET, _diffusers_version=version)
    build = opened(copy)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy)
    assert theirs.unet.config.sample_size == edge
    assert build.family.config(build.source)["sizes"]["default"] == edge * theirs.vae_scale_factor
    unet = next(part for part in build.parts if part.name == "unet")
    assert unet.signature.dims["height"].opt == edge


def test_values_that_only_defaults_wrote_are_left_to_the_class(copy: Path) -> None:
    edit(copy, SCHEDULER, beta_end=0.5, _use_default_values=["beta_end"])
    edit(copy, VAE, scaling_factor=9.0, _use_default_values=["scaling_factor"])
    config = DiffusionConfig.parse(opened(copy).family.config(resolve(str(copy))))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy)
    assert config.scheduler.read("DDIMScheduler").beta_end == theirs.scheduler.config.beta_end == 0.02
    assert config.vae.scaling_factor == theirs.vae.config.scaling_factor == 0.18215


def test_what_diffusers_does_not_read_of_an_autoencoder_is_not_read(copy: Path) -> None:
    """Its pipelines of this family divide by scaling_factor and do nothing else (StableDiffusionPipeline.__call__)."""
    edit(copy, VAE, shift_factor=0.3, latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    vae = opened(copy).family.config(resolve(str(copy)))["vae"]
    assert vae.get("shift_factor", 0.0) == 0.0 and vae["scaling_factor"] == 0.5


def test_a_text_encoder_may_be_published_as_a_whole_clip(copy: Path) -> None:
    text = json.loads((copy / TEXT).read_bytes())
    (copy / TEXT).write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text}))
    assert opened(copy).parts[0].components[0].model.config.hidden_size == 16


def test_a_scheduler_file_of_another_class_is_reported(copy: Path) -> None:
    """As in diffusers, model_index.json decides."""
    edit(copy, SCHEDULER, _class_name="PNDMScheduler")
    build = opened(copy)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy).scheduler
    assert build.family.config(build.source)["scheduler"]["_class_name"] == type(theirs).__name__ == "DDIMScheduler"
    (note,) = build.family.notes(build.source)
    assert "names DDIMScheduler, scheduler_config.json PNDMScheduler: the first counts" in note


def test_a_sampler_of_its_own_is_no_replacement(copy: Path) -> None:
    set_scheduler(copy, "SASolverScheduler")
    assert "SASolverScheduler is replaced: dpmpp_2m" in family_of(resolve(str(copy))).notes(resolve(str(copy)))[0]
    (copy / "enginecast.json").write_text('{"sampler": "euler"}')
    assert family_of(resolve(str(copy))).notes(resolve(str(copy))) == ()


@pytest.mark.parametrize(
    "class_name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_a_scheduler_that_diffusers_saves_comes_through_the_manifest(copy: Path, class_name: str) -> None:
    """What it saves is no strict JSON: the default of lambda_min_clipped is -Infinity."""
    getattr(diffusers, class_name)(beta_end=0.012, timestep_spacing="trailing").save_pretrained(copy / "scheduler")
    edit(copy, INDEX, scheduler=["diffusers", class_name])
    config = opened(copy).family.config(resolve(str(copy)))
    written = json.loads(json.dumps(config, allow_nan=False))
    schedule = DiffusionConfig.parse(written).scheduler.read("DPMSolverMultistepScheduler")
    assert (schedule.beta_end, schedule.timestep_spacing, schedule.lambda_min_clipped) == (
        0.012,
        "trailing",
        -float("inf"),
    )


@pytest.mark.parametrize(
    "fields", [{"steps_offset": 0, "clip_sample": True}, {"steps_offset": ..., "clip_sample": ...}]
)
def test_old_scheduler_files_are_corrected_as_in_diffusers(copy: Path, fields: dict[str, Any]) -> None:
    edit(copy, SCHEDULER, **fields)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy).scheduler.config
    ours = family_of(resolve(str(copy))).config(resolve(str(copy)))["scheduler"]
    assert all(ours[name] == theirs[name] for name in fields)


LEARNED = ("<cat-toy>", "<cat-toy>_1", "<cat-toy>_2")


@pytest.fixture(scope="module")
def old(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as older programs wrote it: learned tokens in added_tokens.json, a safety checker, SASolver."""
    folder = Path(shutil.copytree(tiny_diffusion, tmp_path_factory.mktemp("old") / "old"))
    set_scheduler(folder, "SASolverScheduler", tensor_format="pt", skip_prk_steps=True)
    edit(folder, INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    saved = json.loads((folder / "tokenizer" / "tokenizer.json").read_bytes())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    edit(folder, "tokenizer/tokenizer_config.json", added_tokens_decoder=...)
    size = len(saved["model"]["vocab"])
    (folder / "tokenizer" / "added_tokens.json").write_text(
        json.dumps({token: size + i for i, token in enumerate(LEARNED)})
    )
    state = load_file(folder / "text_encoder" / "model.safetensors")
    (name,) = (name for name in state if name.endswith("token_embedding.weight"))
    state[name] = torch.cat([state[name], torch.full((3, state[name].shape[1]), 0.1, dtype=state[name].dtype)])
    save_file(state, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    edit(folder, TEXT, vocab_size=size + 3)
    return folder


@pytest.fixture(scope="module")
def old_bundle(old: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its bundle, and what the build printed."""
    output = tmp_path_factory.mktemp("old") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["enginecast", "build", str(old), "--output", str(output), "--target", "onnxruntime"]
        )
        printed: list[str] = []
        patch.setattr(export.cli.commands.out, "print", lambda *texts, **_: printed.extend(map(str, texts)))
        with pytest.raises(SystemExit) as ended:
            export.cli.commands.main()
        assert not ended.value.code
    return output, "\n".join(printed)


def test_a_replacement_is_reported_by_the_build_and_in_every_answer(
    old_bundle: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, printed = old_bundle
    replaced = (
        "SASolverScheduler is replaced: dpmpp_2m draws on the same noise schedule, "
        "unless a request names another sampler"
    )
    checker = "the safety checker (StableDiffusionSafetyChecker) is left out: pictures are not checked"
    assert f"note: {replaced}\nnote: {checker}" in printed
    assert Bundle(root).manifest.notes == (replaced, checker)
    monkeypatch.setattr(sys, "argv", ["enginecast", "inspect", str(root)])
    with pytest.raises(SystemExit):
        export.cli.commands.main()
    assert f"note: {replaced}" in capsys.readouterr().out
    with enginecast.load(root) as model:
        done = model.generate("x", steps=1, width=16, height=16).done
    assert list(done.notes)[:2] == [replaced, checker]


@pytest.mark.parametrize("prompt", ["a red <cat-toy>", "<cat-toy>_1", "<cat-toy>, <cat-toy>_2 and <CAT-TOY>"])
def test_learned_tokens_reach_the_text_encoder_as_in_diffusers(
    old: Path, old_bundle: tuple[Path, str], prompt: str
) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(old, safety_checker=None)
    seen: list[Any] = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pipe.encode_prompt(prompt, "cpu", 1, False)
    bundle = Bundle(old_bundle[0])
    call = next(DiffusionPipeline.open(bundle.root, bundle.manifest.config)(ImageRequest(prompt, guidance_scale=1.0)))
    assert isinstance(call, Call) and call.submodel == "text_encoder"
    np.testing.assert_array_equal(call.inputs["input_ids"], seen[0].numpy())


@pytest.mark.parametrize("source", ["tiny_diffusion", "tiny_xl"])
def test_a_unet_for_inpainting_is_one_by_its_channels(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(source), tmp_path / "model"))
    edit(folder, UNET, in_channels=9)
    edit(
        folder,
        INDEX,
        _class_name=json.loads((folder / INDEX).read_bytes())["_class_name"].replace("Pipe", "InpaintPipe"),
    )
    build = opened(folder)
    unet = next(part for part in build.parts if part.name == "unet")
    assert (unet.signature.inputs[0].dims[1], unet.signature.outputs[0].dims[1]) == (9, 4)
    assert build.refused == [] and build.family.config(build.source)["inpainting"]


def test_other_pipelines_of_the_same_models_are_the_same(copy: Path) -> None:
    plain = opened(copy)
    edit(copy, INDEX, _class_name="StableDiffusionImg2ImgPipeline")
    other = opened(copy)
    assert other.family is plain.family and other.family.config(other.source) == plain.family.config(plain.source)
    assert "inpainting" not in other.family.config(other.source)


def with_nine_channels(pipe: Any) -> Any:
    """A pipeline for inpainting, with a random UNet."""
    torch.manual_seed(1)
    config = {key: value for key, value in pipe.unet.config.items() if key[0] != "_"}
    unet = diffusers.UNet2DConditionModel(**config | {"in_channels": 9})
    return diffusers.StableDiffusionInpaintPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)


@pytest.mark.full
def test_a_model_for_inpainting_is_calibrated_on_masked_pictures(tiny_diffusion: Path, tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_diffusion, dtype=torch.float32)
    with_nine_channels(pipe).save_pretrained(tmp_path / "model")
    options = Options(
        str(tmp_path / "model"), tmp_path / "b", targets=TARGETS[:1], quant="int8", allow_low_quality=True
    )
    bundle, timings = build(options)
    assert "calibrate" in timings and "W8A8" in str(bundle.submodel("unet").precision)


@pytest.mark.full
def test_a_unet_for_inpainting_draws_as_in_diffusers(tiny_diffusion: Path, tmp_path: Path) -> None:
    theirs = with_nine_channels(diffusers.StableDiffusionPipeline.from_pretrained(tiny_diffusion, dtype=torch.float32))
    theirs.save_pretrained(tmp_path / "model")
    request = request_of("euler", strength=1.0, mask=MASK, keep_unmasked=False)
    with pytest.MonkeyPatch.context() as patch:
        expected = library(
            theirs, request, patch, mask_image=Image.fromarray(MASK).convert("L"), height=HEIGHT, width=WIDTH
        )
    for target in TARGETS:
        build(Options(str(tmp_path / "model"), tmp_path / target, targets=(target,)))
        model = load_model(tmp_path / target)
        assert psnr(drawn(model.pipeline, model.engines, request), expected) >= 40
        model.close()
