"""Pictures of every size that the VAE's factor divides, against diffusers' own pipeline.

The UNet halves an edge twice. Where 4 does not divide it, diffusers interpolates to the sizes on the way down.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.build.build import build
from export.build.options import Options
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig, Sizes
from runtime.diffusion.variation import random_stream
from runtime.errors import InvalidInput
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.image import ImageReady, ImageRequest

pytestmark = [
    pytest.mark.full,  # the usual tests have an odd size of Stable Diffusion XL
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch tensors inside diffusers
]
TARGETS = ("onnxruntime", "openvino")
FACTOR = 8
REQUEST = ImageRequest("a large red circle", "blue", steps=2, guidance_scale=4.0, seed=3)
LATENTS = [(5, 4), (6, 9), (7, 11), (4, 8)]
"""Heights and widths with every remainder of a division by 4."""


@pytest.fixture(scope="module")
def deep(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_diffusion` with a UNet of three levels and a VAE of four."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = Path(shutil.copytree(tiny_diffusion, tmp_path_factory.mktemp("deep") / "model"))
    for name in ("unet", "vae"):
        shutil.rmtree(folder / name)
    torch.manual_seed(1)
    unet: Any = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae: Any = AutoencoderKL(
        block_out_channels=(4, 4, 4, 8), norm_num_groups=2, sample_size=128, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    for name, model in (("unet", unet), ("vae", vae)):
        model.half().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def bundle(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("deep") / "bundle"
    build(Options(str(deep), output, targets=TARGETS, quality="none"))
    return output


@pytest.fixture(scope="module", params=TARGETS)
def ours(bundle: Path, request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    model = load_model(bundle, request.param)
    yield model
    model.close()


@pytest.fixture(scope="module")
def theirs(deep: Path) -> Any:
    """diffusers' pipeline on the checkpoint, in float32."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(deep, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(model: LoadedModel, request: ImageRequest) -> Array:
    (ready,) = (event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady))
    return ready.image


def expected(pipe: Any, height: int, width: int) -> Array:
    """What diffusers draws from the same noise."""
    noise = random_stream(3).standard_normal((1, 4, height, width), np.float32)
    images = pipe(
        REQUEST.prompt, negative_prompt=REQUEST.negative_prompt, num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.guidance_scale, height=FACTOR * height, width=FACTOR * width,
        latents=torch.from_numpy(noise), output_type="np",
    ).images  # fmt: skip
    return np.asarray(np.round(images[0] * 255), np.uint8)


@pytest.mark.parametrize(("height", "width"), LATENTS)
def test_the_same_picture_as_diffusers(theirs: Any, ours: LoadedModel, height: int, width: int) -> None:
    wanted = expected(theirs, height, width)
    got = drawn(ours, replace(REQUEST, height=FACTOR * height, width=FACTOR * width))
    differ = np.abs(wanted.astype(int) - got.astype(int))
    assert wanted.std() > 20 and differ.max() <= 1 and (differ > 0).mean() < 0.02


def test_tiles_fit_every_size(theirs: Any, ours: LoadedModel) -> None:
    """Of a width that no multiple of the UNet's step divides into tiles."""
    pipeline = ours.pipeline
    assert isinstance(pipeline, DiffusionPipeline)
    (limit,) = pipeline.keep_within({"vae_decoder": 4.0 * 4 * 17 * 17})
    assert "are decoded in tiles" in limit
    try:
        tiled = drawn(ours, replace(REQUEST, height=FACTOR * 17, width=FACTOR * 27))
    finally:
        pipeline.keep_within({"vae_decoder": float("inf")})
    whole = expected(theirs, 17, 27).astype(float)
    assert tiled.shape == whole.shape
    assert 10 * np.log10(255**2 / np.square(tiled - whole).mean()) > 20


def test_sizes_are_multiples_of_the_vae_s_factor(bundle: Path) -> None:
    config = DiffusionConfig.parse(Bundle(bundle).manifest.config)
    assert config.sizes == Sizes(min=32, max=1024, default=128, multiple=FACTOR)
    with pytest.raises(InvalidInput, match="width: is 132 pixels, expected 32 to 1024, a multiple of 8"):
        config.size_of(ImageRequest("x", width=132))
