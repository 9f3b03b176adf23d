"""Image adapters beside Stable Diffusion, from their files to the picture, on every engine, against diffusers' own
pipelines with `load_ip_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calibration.observe.metrics import PEAK, psnr_db
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.diffusion.guides import Style
from runtime.diffusion.variation import random_stream
from runtime.errors import InvalidInput, NotFound, UnsupportedModel
from runtime.placing.loading import LoadedModel, load_model, open_pipeline
from runtime.tasks.image import ImageRequest
from tests.export.families.conftest import TARGETS, drawn
from tests.fakes.library import LibraryModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch tensors inside diffusers
NAMES = ("content", "style")
WIDTH, HIDDEN = 12, 16
"""Of the encoder: its vector of a picture, and its hidden states."""
PICTURES = [np.random.default_rng(i).integers(0, 255, (40, 56, 3), dtype=np.uint8) for i in range(2)]
REQUEST = ImageRequest("a large red circle", "blue", 24, 16, steps=4, guidance_scale=4.0, seed=3)
BOTH = (Style("style", PICTURES[1], 0.7), Style("content", PICTURES[0], 0.4))
REQUESTS = {
    "content and style": replace(REQUEST, styles=BOTH),
    "no guidance": replace(REQUEST, styles=BOTH, guidance_scale=1.0),
    "style alone": replace(REQUEST, styles=BOTH[:1]),
}


def plain(context: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a plain projection to tokens of this width."""
    return {"proj.weight": (4 * context, WIDTH), "proj.bias": (4 * context,), "norm.weight": (context,),
        "norm.bias": (context,)}  # fmt: skip


def full_face(context: int) -> dict[str, tuple[int, ...]]:
    return {"proj.0.weight": (HIDDEN, HIDDEN), "proj.0.bias": (HIDDEN,), "proj.2.weight": (context, HIDDEN),
        "proj.2.bias": (context,), "proj.3.weight": (context,), "proj.3.bias": (context,)}  # fmt: skip


def plus(context: int, inner: int = 128) -> dict[str, tuple[int, ...]]:
    """Of a resampler with four layers of two heads, which makes three tokens."""
    found: dict[str, tuple[int, ...]] = {
        "latents": (1, 3, inner), "proj_in.weight": (inner, HIDDEN), "proj_in.bias": (inner,),
        "proj_out.weight": (context, inner), "proj_out.bias": (context,), "norm_out.weight": (context,),
        "norm_out.bias": (context,),
    }  # fmt: skip
    for layer in (f"layers.{i}" for i in range(4)):
        found |= {
            f"{layer}.{norm}.{one}": (inner,) for norm in ("0.norm1", "0.norm2", "1.0") for one in ("weight", "bias")
        }
        found |= {f"{layer}.0.to_q.weight": (inner, inner), f"{layer}.0.to_kv.weight": (2 * inner, inner),
            f"{layer}.0.to_out.weight": (inner, inner), f"{layer}.1.1.weight": (4 * inner, inner),
            f"{layer}.1.3.weight": (inner, 4 * inner)}  # fmt: skip
    return found


Kind = Callable[[int], dict[str, tuple[int, ...]]]


def adapters(source: Path, folder: Path, *kinds: Kind) -> tuple[Addition, ...]:
    """Two adapters for a checkpoint, plain or of these kinds, and their encoder, of random float16 weights, large
    enough to be seen.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    layers = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**layers, image_size=32, patch_size=8, projection_dim=WIDTH)
    CLIPVisionModelWithProjection(config).half().save_pretrained(folder / "image_encoder")
    unet: Any = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    context = unet.config.cross_attention_dim
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for name, kind in zip(NAMES, kinds or (plain, plain), strict=True):
        tensors = {f"image_proj.{own}": torch.randn(shape) for own, shape in kind(context).items()}
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
def theirs(source: Path, additions: tuple[Addition, ...]) -> Callable[[ImageRequest], Array]:
    return of_diffusers(source, additions)


def of_diffusers(source: Path, additions: tuple[Addition, ...]) -> Callable[[ImageRequest], Array]:
    """What diffusers' pipeline draws from the same noise."""
    import diffusers

    kind = "tiny_xl" if (source / "text_encoder_2").is_dir() else "tiny_diffusion"

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


@pytest.mark.full
@pytest.mark.parametrize("case", REQUESTS)
def test_the_same_picture_as_diffusers(theirs: Callable[[ImageRequest], Array], ours: LoadedModel, case: str) -> None:
    wanted, got = theirs(REQUESTS[case]), drawn(ours, REQUESTS[case])
    print(f"{ours.target}, {case}: {psnr_db(wanted, got, PEAK):.1f} dB")
    assert psnr_db(wanted, got, PEAK) > 40 and wanted.std() > 20
    assert psnr_db(wanted, drawn(ours, replace(REQUESTS[case], styles=())), PEAK) < 35, "the pictures are seen"


@pytest.mark.parametrize(
    "kinds",
    [(plus, full_face), pytest.param((plain, plus), marks=pytest.mark.full)],
    ids=lambda kinds: " and ".join(kind.__name__ for kind in kinds),
)
def test_adapters_of_other_kinds(tiny_diffusion: Path, tmp_path: Path, kinds: tuple[Kind, ...]) -> None:
    """The library's own networks, our pipeline."""
    additions = adapters(tiny_diffusion, tmp_path, *kinds)
    theirs, model = of_diffusers(tiny_diffusion, additions), LibraryModel.of(tiny_diffusion, tmp_path, *additions)
    for request in (REQUESTS["content and style"], REQUESTS["no guidance"]):
        wanted = theirs(request)
        assert psnr_db(wanted, model.draw(request), PEAK) > 40 and wanted.std() > 20
        for style in BOTH:
            without = replace(request, styles=tuple(one for one in BOTH if one is not style))
            assert psnr_db(wanted, model.draw(without), PEAK) < 35, f"{style.name} is seen"


@pytest.mark.full
def test_a_bundle_with_adapters_of_several_kinds(tiny_xl: Path, tmp_path: Path) -> None:
    additions = adapters(tiny_xl, tmp_path, plain, plus)
    request = REQUESTS["content and style"]
    wanted = of_diffusers(tiny_xl, additions)(request)
    build(Options(str(tiny_xl), tmp_path / "bundle", TARGETS, agreement="none", additions=additions))
    for target in TARGETS:
        with closing(load_model(tmp_path / "bundle", target)) as model:
            assert psnr_db(wanted, drawn(model, request), PEAK) > 40 and wanted.std() > 20


@pytest.mark.full
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


@pytest.mark.full
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


def face_id(tensors: Tensors) -> Tensors:
    return {f"image_proj.{name}": torch.zeros(4) for name in ("proj.0.weight", "proj.2.weight", "norm.weight")}


def unknown(tensors: Tensors) -> Tensors:
    return {"image_proj.query": torch.zeros(4)}


def half_a_resampler(tensors: Tensors) -> Tensors:
    return {"image_proj.latents": torch.zeros(1, 16, 8)}


def of_another_width(tensors: Tensors) -> Tensors:
    return tensors | {"image_proj.proj.weight": torch.zeros(4, 16, 2)}


def of_another_encoder(tensors: Tensors) -> Tensors:
    return tensors | {"image_proj.proj.weight": torch.zeros(4 * 16, 20)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrow, "makes tokens of width 24, the UNet has cross_attention_dim 16: this adapter was made for another"),
        (without_a_layer, "ip_adapter.3.to_k_ip.weight is None, expected .*: this adapter was made for another"),
        (face_id, "of the kind FaceID, which reads the features of a face recognizer, expected an IP-Adapter of"),
        (unknown, "has none of image_proj.proj.weight, .*: expected an IP-Adapter of the kind plain, plus"),
        (half_a_resampler, "has image_proj.latents, but no whole projection beside it"),
        (of_another_width, "has image_proj.proj.weight, but no whole projection"),
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
