"""Every family at int8, int4 and nf4, calibrated on requests of its task, for every target that compiles here and has
kernels for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import diffusers
import pytest
import torch

from calibration.quantize.recipes import RECIPES
from export.build.build import build
from export.build.options import Options
from export.checkpoint.additions import Addition
from export.family import families
from runtime.engine import targets
from tests.export.checkpoint import loras
from tests.export.families.conftest import save, save_next
from tests.export.families.test_autoencoder import tiny
from tests.export.families.test_controlnet import networks
from tests.export.families.test_distilled import distilled
from tests.export.families.test_ip_adapter import adapters
from tests.export.families.test_refiner import tiny_refiner
from tests.export.families.test_stable_diffusion import with_nine_channels

__all__ = ["tiny_refiner"]
pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning", "ignore::FutureWarning")
TARGETS: Final = tuple(
    name for name, engine in targets().items() if engine.available().usable or engine.available().compiles
)
QUANTS: Final = ("int8", "int4", "nf4")


class Made(NamedTuple):
    """A checkpoint and what is added to it."""

    source: Path
    additions: tuple[Addition, ...] = ()


def lcm(source: Path, folder: Path) -> Made:
    kind = diffusers.LatentConsistencyModelPipeline
    return Made(distilled(source, folder / "lcm", kind, requires_safety_checker=False))


def inpainting(source: Path, folder: Path) -> Made:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    with_nine_channels(pipe).save_pretrained(folder / "inpainting")
    return Made(folder / "inpainting")


def taesd(source: Path, folder: Path) -> Made:
    tiny().half().save_pretrained(folder / "taesd")
    return Made(source, (Addition("vae", folder / "taesd"),))


def controlnet(source: Path, folder: Path) -> Made:
    return Made(source, networks(source, folder))


def ip_adapter(source: Path, folder: Path) -> Made:
    return Made(source, adapters(source, folder))


def switched_lora(source: Path, folder: Path) -> Made:
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    file = loras.of_diffusers(folder / "look.safetensors", {"unet": unet}, lambda layer: "to_" in layer)
    return Made(source, (Addition("adapter", file),))


def llava(source: Path, folder: Path) -> Made:
    """As wide as a group of int4 weights, which `tiny_vlm` is not."""
    return Made(save(folder / "llava", {}, {}, {}, {}, None))


def siglip(source: Path, folder: Path) -> Made:
    vision, full = {"model_type": "siglip_vision_model"}, {"vision_feature_select_strategy": "full"}
    return Made(save(folder / "siglip", {}, vision, full, full | {"num_additional_image_tokens": 0}, None))


def llava_next(source: Path, folder: Path) -> Made:
    return Made(save_next(folder / "next"))


class Row(NamedTuple):
    """The class of a checkpoint, its fixture, and what is made of it."""

    architecture: str
    fixture: str
    make: Callable[[Path, Path], Made] = lambda source, folder: Made(source)


SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
VARIANTS: Final[Mapping[str, Row]] = {
    "stable-diffusion-1": Row(SD, "tiny_diffusion"),
    "stable-diffusion-2": Row(SD, "tiny_v2"),
    "latent-consistency": Row("LatentConsistencyModelPipeline", "tiny_diffusion", lcm),
    "inpainting": Row("StableDiffusionInpaintPipeline", "tiny_diffusion", inpainting),
    "taesd": Row(SD, "tiny_diffusion", taesd),
    "controlnet": Row(SD, "tiny_diffusion", controlnet),
    "ip-adapter": Row(SD, "tiny_diffusion", ip_adapter),
    "switched-lora": Row(SD, "tiny_diffusion", switched_lora),
    "xl": Row(XL, "tiny_xl"),
    "xl-refiner": Row("StableDiffusionXLImg2ImgPipeline", "tiny_refiner"),
    "xl-controlnet": Row(XL, "tiny_xl", controlnet),
    "xl-ip-adapter": Row(XL, "tiny_xl", ip_adapter),
    "xl-switched-lora": Row(XL, "tiny_xl", switched_lora),
    "llava": Row("LlavaForConditionalGeneration", "tiny_vlm", llava),
    "llava-siglip": Row("LlavaForConditionalGeneration", "tiny_vlm", siglip),
    "llava-next": Row("LlavaNextForConditionalGeneration", "tiny_vlm", llava_next),
    "blip2-opt": Row("Blip2ForConditionalGeneration", "tiny_blip2"),
    "blip2-t5": Row("Blip2ForConditionalGeneration", "tiny_blip2_t5"),
    "instructblip-vicuna": Row("InstructBlipForConditionalGeneration", "tiny_instructblip"),
    "instructblip-t5": Row("InstructBlipForConditionalGeneration", "tiny_instructblip_t5"),
    "blip2-retrieval": Row("Blip2ForImageTextRetrieval", "tiny_blip2_retrieval"),
    "clip": Row("CLIPModel", "tiny_clip"),
    "siglip": Row("SiglipModel", "tiny_siglip"),
}
FAST: Final = {("clip", "int4")}
ROWS = [
    pytest.param(variant, quant, marks=() if (variant, quant) in FAST else pytest.mark.full)
    for variant in VARIANTS
    for quant in QUANTS
]


def test_every_family_has_a_row() -> None:
    built = {families()[row.architecture].name for row in VARIANTS.values()}
    assert built == {family.name for family in families().values()}


@pytest.mark.parametrize(("variant", "quant"), ROWS)
def test_every_target_computes_what_the_graph_says(
    variant: str, quant: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build fails where a target cannot compile a submodel, or computes something else than its graph on captured
    calls. Random weights have no quality to keep, but it is measured.
    """
    for small in ("int4", "nf4"):
        monkeypatch.setitem(RECIPES, small, replace(RECIPES[small], worth=0))  # the models are tiny
    row = VARIANTS[variant]
    source, additions = row.make(Path(request.getfixturevalue(row.fixture)), tmp_path)
    able = tuple(name for name in TARGETS if targets()[name].precisions >= RECIPES[quant].precisions)
    options = Options(str(source), tmp_path / "b", able, quant, allow_low_quality=True, additions=additions)
    bundle, timings = build(options)
    assert bundle.manifest.source.architecture == row.architecture
    submodels = bundle.manifest.submodels
    artifacts = {(one.target, one.submodel): one for one in bundle.manifest.artifacts}
    assert artifacts.keys() == {(name, submodel.name) for name in able for submodel in submodels}
    assert all(one.agreement or one.unchecked for one in artifacts.values())
    assert quant in {one.form for submodel in submodels for one in submodel.weights}
    assert "calibrate" in timings and bundle.manifest.quality is not None
