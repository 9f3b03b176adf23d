"""Abilities used together draw what diffusers' pipelines for both draw: the library's own networks, our pipeline."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from export.build.build import build
from export.build.options import Options
from export.checkpoint.additions import Addition
from runtime.diffusion.guides import Control, Style
from runtime.placing.loading import load_model
from runtime.tasks.image import CONDITIONS, ImageRequest
from runtime.vision.images import Picture
from tests.export.checkpoint import loras
from tests.export.families.test_controlnet import networks
from tests.export.families.test_distilled import lcm
from tests.export.families.test_ip_adapter import NAMES as ADAPTERS
from tests.export.families.test_ip_adapter import adapters
from tests.export.families.test_refiner import tiny_refiner
from tests.fakes.library import LibraryModel
from tests.runtime.pipelines.test_canvas import HEIGHT, MASK, TARGETS, WIDTH, drawn, library, photograph, request_of
from tests.runtime.pipelines.test_diffusion import psnr

__all__ = ["lcm", "tiny_refiner"]
pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning", "ignore::FutureWarning")
LEAST_DB = 40
EDGES = np.random.default_rng(5).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
STYLE = np.random.default_rng(6).integers(0, 255, (40, 56, 3), dtype=np.uint8)
CONTROLS = (Control("edges", EDGES, 0.9), Control("depth", photograph()[::-1].copy(), 0.6, 0.2, 0.7))
STYLES = (Style("style", STYLE, 0.7), Style("content", photograph(), 0.4))
DRAWN_ON = request_of("euler", strength=0.7)
MASKED = replace(DRAWN_ON, mask=MASK, keep_unmasked=False)
BASE, XL = "StableDiffusion", "StableDiffusionXL"


def picture(image: Any) -> Image.Image:
    return Image.fromarray(np.asarray(image))


def added_to(request: ImageRequest) -> dict[str, Any]:
    """What diffusers' pipelines take for the controls and styles of a request."""
    found: dict[str, Any] = {}
    if request.controls:
        found["control_image"] = [picture(control.image) for control in request.controls]
        found["controlnet_conditioning_scale"] = [control.scale for control in request.controls]
        found["control_guidance_start"] = [control.start for control in request.controls]
        found["guess_mode"] = request.guess_mode
        found["control_guidance_end"] = [control.end for control in request.controls]
    if request.styles:
        given = {style.name: style for style in request.styles}
        found["ip_adapter_image"] = [picture(given[name].image) for name in ADAPTERS]
    if request.mask is not None:
        found |= {"mask_image": picture(request.mask).convert("L"), "height": HEIGHT, "width": WIDTH}
    found |= request.conditions
    if crop := found.pop("crop_top_left", None):
        found["crops_coords_top_left"] = crop
    return found


def theirs(
    kind: str, source: Path, request: ImageRequest, additions: tuple[Addition, ...], patch: pytest.MonkeyPatch
) -> Picture:
    """What diffusers' pipeline of this kind draws, with the additions that the request names."""
    paths = {one.name: one.path for one in additions}
    more: dict[str, Any] = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    if request.controls:
        names = [control.name for control in request.controls]
        more["controlnet"] = [diffusers.ControlNetModel.from_pretrained(paths[name]) for name in names]
    pipe: Any = getattr(diffusers, kind).from_pretrained(source, dtype=torch.float32, **more)
    if request.styles:
        files = [paths[name] for name in ADAPTERS]
        pipe.load_ip_adapter(
            [str(file.parent) for file in files], subfolder="", weight_name=[file.name for file in files],
            image_encoder_folder="image_encoder",
        )  # fmt: skip
        given = {style.name: style for style in request.styles}
        pipe.set_ip_adapter_scale([given[name].scale for name in ADAPTERS])
    loras.fused(pipe, *((paths[name], scale) for name, scale in request.loras.items()))
    return library(pipe, request, patch, **added_to(request))


def in_file(source: Path, folder: Path) -> Addition:
    """A LoRA of the UNet."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    path = loras.of_diffusers(folder / "look.safetensors", {"unet": unet}, lambda layer: "to_" in layer)
    return Addition("adapter", path)


@pytest.fixture(scope="module")
def for_inpainting(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a UNet of 9 channels."""
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(tiny_diffusion, dtype=torch.float32)
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    folder = tmp_path_factory.mktemp("sources") / "tiny-inpainting"
    diffusers.StableDiffusionInpaintPipeline(
        **{**pipe.components, "unet": unet}, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


SIZED: dict[str, Any] = {
    "original_size": (700, 90), "crop_top_left": (50, 3), "target_size": (30, 900),
    "negative_original_size": (80, 600), "negative_target_size": (800, 20),
}  # fmt: skip
Case = tuple[str, str, ImageRequest]
CASES: dict[str, Case] = {
    "control, image to image": (
        "tiny_diffusion", f"{BASE}ControlNetImg2ImgPipeline", replace(DRAWN_ON, controls=CONTROLS)
    ),
    "control, inpainting": ("tiny_diffusion", f"{BASE}ControlNetInpaintPipeline", replace(MASKED, controls=CONTROLS)),
    "control, a UNet for inpainting": (
        "for_inpainting", f"{BASE}ControlNetInpaintPipeline", replace(MASKED, controls=CONTROLS)
    ),
    "style, image to image": ("tiny_diffusion", f"{BASE}Img2ImgPipeline", replace(DRAWN_ON, styles=STYLES)),
    "style, inpainting": ("tiny_diffusion", f"{BASE}InpaintPipeline", replace(MASKED, styles=STYLES)),
    "control, LoRA, style, image to image": (
        "tiny_diffusion", f"{BASE}ControlNetImg2ImgPipeline",
        replace(DRAWN_ON, controls=CONTROLS[:1], loras={"look": 0.8}, styles=STYLES),
    ),
    "latent consistency, image to image": (
        "lcm", "LatentConsistencyModelImg2ImgPipeline", replace(DRAWN_ON, sampler="lcm", steps=4, strength=0.5)
    ),
    "latent consistency, style, most steps": (
        "lcm", "LatentConsistencyModelImg2ImgPipeline",
        replace(DRAWN_ON, sampler="lcm", steps=7, strength=0.15, styles=STYLES),
    ),
    "controls in guess mode, image to image": (
        "tiny_diffusion", f"{BASE}ControlNetImg2ImgPipeline", replace(DRAWN_ON, controls=CONTROLS, guess_mode=True)
    ),
    "a control in guess mode without guidance, inpainting": (
        "tiny_diffusion", f"{BASE}ControlNetInpaintPipeline",
        replace(MASKED, controls=CONTROLS[:1], guess_mode=True, guidance_scale=1.0),
    ),
    "XL: a control in guess mode, image to image": (
        "tiny_xl", f"{XL}ControlNetImg2ImgPipeline", replace(DRAWN_ON, controls=CONTROLS[:1], guess_mode=True)
    ),
    "XL: control, image to image": (
        "tiny_xl", f"{XL}ControlNetImg2ImgPipeline", replace(DRAWN_ON, controls=CONTROLS)
    ),
    "XL: control, style, inpainting": (
        "tiny_xl", f"{XL}ControlNetInpaintPipeline", replace(MASKED, controls=CONTROLS, styles=STYLES)
    ),
    "XL: the refiner, inpainting": ("tiny_refiner", f"{XL}InpaintPipeline", MASKED),
    "XL: the refiner with scores, image to image": (
        "tiny_refiner", f"{XL}Img2ImgPipeline",
        replace(DRAWN_ON, aesthetic_score=9.0, negative_aesthetic_score=0.5, original_size=(100, 700)),
    ),
    "XL: sizes of both prompts, image to image": ("tiny_xl", f"{XL}Img2ImgPipeline", replace(DRAWN_ON, **SIZED)),
}  # fmt: skip
"""A checkpoint, diffusers' pipeline, and what both draw."""


FULL = {
    "control, image to image", "control, inpainting", "style, image to image", "style, inpainting",
    "latent consistency, image to image", "a control in guess mode without guidance, inpainting",
    "XL: a control in guess mode, image to image", "XL: control, image to image",
}  # fmt: skip
"""Those whose parts are in another case, too."""


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES])
def test_the_same_picture_as_diffusers(
    case: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind, wanted = CASES[case]
    source: Path = request.getfixturevalue(name)
    plain: Path = request.getfixturevalue("tiny_diffusion") if name == "for_inpainting" else source
    additions: tuple[Addition, ...] = networks(plain, tmp_path) if wanted.controls else ()
    additions += adapters(source, tmp_path) if wanted.styles else ()
    additions += (in_file(source, tmp_path),) if wanted.loras else ()
    expected = theirs(kind, source, wanted, additions, monkeypatch)
    model = LibraryModel.of(source, tmp_path, *additions)
    found = psnr(model.draw(wanted), expected)
    bare: dict[str, Any] = {"controls": (), "guess_mode": False, "styles": (), "loras": {}, **dict.fromkeys(CONDITIONS)}
    without = psnr(model.draw(replace(wanted, **bare)), expected)
    print(f"{case}: {found:.1f} dB, {without:.1f} dB without what is added")
    assert found >= LEAST_DB and expected.std() > 10
    assert without < 36 or not additions
    assert without < 45 or not wanted.conditions


@pytest.mark.full  # a bundle
def test_all_at_once_on_engines(tiny_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls, styles and a LoRA in one bundle, from a picture and with a mask."""
    additions = (
        *networks(tiny_diffusion, tmp_path), *adapters(tiny_diffusion, tmp_path), in_file(tiny_diffusion, tmp_path)
    )  # fmt: skip
    build(Options(str(tiny_diffusion), tmp_path / "bundle", TARGETS, agreement="none", additions=additions))
    added: dict[str, Any] = {"controls": CONTROLS, "styles": STYLES, "loras": {"look": 0.8}}
    for kind, plain in (("Img2Img", DRAWN_ON), ("Inpaint", MASKED)):
        wanted = replace(plain, **added)
        with monkeypatch.context() as patch:
            expected = theirs(f"{BASE}ControlNet{kind}Pipeline", tiny_diffusion, wanted, additions, patch)
        for target in TARGETS:
            with closing(load_model(tmp_path / "bundle", target)) as model:
                assert psnr(drawn(model.pipeline, model.engines, wanted), expected) >= LEAST_DB


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_inpainting_of_xl_on_engines(
    tiny_xl: Path, xl_bundle: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = theirs(f"{XL}InpaintPipeline", tiny_xl, MASKED, (), monkeypatch)
    with closing(load_model(xl_bundle, target)) as model:
        assert psnr(drawn(model.pipeline, model.engines, MASKED), expected) >= LEAST_DB
