"""Image adapters beside Stable Diffusion, from their files to the picture, on every engine, against diffusers' own
pipelines with `load_ip_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calibration.observe.metrics import PEAK, psnr_db
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.diffusion.latents import random_stream
from runtime.errors import InvalidInput, NotFound, UnsupportedModel
from runtime.placing.loading import LoadedModel, open_pipeline
from runtime.tasks.image import ImageRequest, Style
from tests.export.families.conftest import drawn

pytestmark = [
    pytest.mark.full,  # three bundles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch tensors inside diffusers
]
NAMES = ("content", "style")
WIDTH = 12
PICTURES = [np.random.default_rng(i).integers(0, 255, (40, 56, 3), dtype=np.uint8) for i in range(2)]
REQUEST = ImageRequest("a large red circle", "blue", 24, 16, steps=4, guidance_scale=4.0, seed=3)
BOTH = (Style("style", PICTURES[1], 0.7), Style("content", PICTURES[0], 0.4))
REQUESTS = {
    "content and style": replace(REQUEST, styles=BOTH),
    "no guidance": replace(REQUEST, styles=BOTH, guidance_scale=1.0),
    "style alone": replace(REQUEST, styles=BOTH[:1]),
}


def adapters(source: Path, folder: Path) -> tuple[Addition, ...]:
    """Two adapters for a checkpoint and their encoder, of random float16 weights, large enough to be seen."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**layers, image_size=32, patch_size=8, projection_dim=WIDTH)
    CLIPVisionModelWithProjection(config).half().save_pretrained(folder / "image_encoder")
    unet: Any = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    context = unet.config.cross_attention_dim
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for name in NAMES:
        tensors = {
            "image_proj.proj.weight": torch.randn(4 * context, WIDTH),
            "image_proj.proj.bias": torch.randn(4 * context),
            "image_proj.norm.weight": torch.ones(context),
            "image_proj.norm.bias": torch.zeros(context),
        }
        for number, layer in enumerate(names):
            for which in ("to_k_ip", "to_v_ip"):
                shape = unet.get_submodule(layer).to_k.out_features, context
                tensors[f"ip_adapter.{2 * number + 1}.{which}.weight"] = torch.randn(shape)
        save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return tuple(Addition("ip_adapter", folder / f"{name}.safetensors") for name in NAMES)


@pytest.fixture(scope="module")
def additions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Addition, ...]:
    return adapters(source, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def theirs(kind: str, source: Path, additions: tuple[Addition, ...]) -> Callable[[ImageRequest], Array]:
    """What diffusers' pipeline draws from the same noise."""
    import diffusers

    more = {"add_watermarker": False} if kind == "tiny_xl" else {"safety_checker": None}
    name = "StableDiffusionXLPipeline" if kind == "tiny_xl" else "StableDiffusionPipeline"
    pipe: Any = getattr(diffusers, name).from_pretrained(source, dtype=torch.float32, **more)
    files = [one.path for one in additions]
    pipe.load_ip_adapter(
        [str(file.parent) for file in files], subfolder="", weight_name=[file.name for file in files],
        image_encoder_folder="image_encoder",
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def draw(request: ImageRequest) -> Array:
        given = {style.name: style for style in request.styles}
        blank = Style("", PICTURES[0], 0.0)
        chosen = [given.get(name, blank) for name in NAMES]
        pipe.set_ip_adapter_scale([style.scale for style in chosen])
        (image,) = pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=request.width,
            height=request.height,
            latents=torch.from_numpy(random_stream(3).standard_normal((1, 4, 8, 12), np.float32)),
            ip_adapter_image=[Image.fromarray(np.asarray(style.image)) for style in chosen],
            output_type="np",
        ).images
        return np.asarray(np.round(image * 255), np.uint8)

    return draw


@pytest.mark.parametrize("case", REQUESTS)
def test_the_same_picture_as_diffusers(theirs: Callable[[ImageRequest], Array], ours: LoadedModel, case: str) -> None:
    wanted, got = theirs(REQUESTS[case]), drawn(ours, REQUESTS[case])
    print(f"{ours.target}, {case}: {psnr_db(wanted, got, PEAK):.1f} dB")
    assert psnr_db(wanted, got, PEAK) > 40 and wanted.std() > 20
    assert psnr_db(wanted, drawn(ours, replace(REQUESTS[case], styles=())), PEAK) < 35, "the pictures are seen"


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        ((Style("styl", PICTURES[0]),), "there is no image adapter 'styl': did you mean 'style'"),
        (BOTH[:1] * 2, "'style' is given twice"),
    ],
)
def test_styles_that_do_not_fit_the_bundle(bundle: Path, styles: tuple[Style, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"styles: {message}"):
        open_pipeline(Bundle(bundle))(replace(REQUEST, styles=styles))


def test_a_picture_for_a_bundle_without_adapters(xl_bundle: Path) -> None:
    with pytest.raises(InvalidInput, match=r"styles: .* this bundle has none: build it with --ip-adapter"):
        open_pipeline(Bundle(xl_bundle))(replace(REQUEST, styles=BOTH))


def test_a_scale_that_no_bundle_has() -> None:
    with pytest.raises(InvalidInput, match="styles: is 11, expected 0 to 10"):
        Style("x", PICTURES[0], 11)


Tensors = dict[str, torch.Tensor]


def narrow(tensors: Tensors) -> Tensors:
    return tensors | {"image_proj.proj.weight": torch.zeros(4 * 24, WIDTH)}


def without_a_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("ip_adapter.3.")}


def plus(tensors: Tensors) -> Tensors:
    return {"image_proj.latents": torch.zeros(1, 16, 8)}


def of_another_encoder(tensors: Tensors) -> Tensors:
    return tensors | {"image_proj.proj.weight": torch.zeros(4 * 16, 20)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrow, "makes tokens of width 24, the UNet has cross_attention_dim 16: this adapter was made for another"),
        (without_a_layer, "ip_adapter.3.to_k_ip.weight is None, expected .*: this adapter was made for another"),
        (plus, "has no image_proj.proj.weight: expected a plain IP-Adapter"),
        (of_another_encoder, "reads features of width 20, image_encoder beside it gives 12"),
    ],
)
def test_adapters_that_cannot_be_added(
    tiny_diffusion: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    (one, _) = adapters(tiny_diffusion, tmp_path)
    save_file(change(load_file(one.path)), one.path)
    with pytest.raises(UnsupportedModel, match=message):
        Build.open(Options(str(tiny_diffusion), tmp_path / "bundle", additions=(one,)))


def test_an_adapter_without_its_encoder(tiny_diffusion: Path, tmp_path: Path) -> None:
    (one, _) = adapters(tiny_diffusion, tmp_path)
    (tmp_path / "image_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(NotFound, match=r"image_encoder/config.json does not exist"):
        Build.open(Options(str(tiny_diffusion), tmp_path / "bundle", additions=(one,)))
