"""Stable Diffusion 2.x, Turbo and latent consistency models draw what diffusers draws from the same noise."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.checkpoint.source import resolve
from export.family import family_of
from runtime.bundle.signature import Array
from runtime.diffusion.variation import random_stream
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.image import ImageReady, ImageRequest
from tests.conftest import cast

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # torch tensors inside diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "v-prediction": (
        "DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
    ),
    "zero terminal SNR": (
        "DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False, "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing"},
    ),
    "turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
}  # fmt: skip
NOISES = ("scheduling_lcm", "scheduling_euler_ancestral_discrete")


def distilled(folder: Path, output: Path, kind: Any, **fields: Any) -> Path:
    """The checkpoint with a UNet of random weights that takes the guidance scale, and the schedule of such models."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    unet: Any = diffusers.UNet2DConditionModel.from_config({**pipeline.unet.config, "time_cond_proj_dim": 8})
    parts = {**pipeline.components, "unet": unet, "scheduler": diffusers.LCMScheduler(), **fields}
    kind(**{name: part.half() if hasattr(part, "half") else part for name, part in parts.items()}).save_pretrained(
        output
    )
    return output


@pytest.fixture(scope="module")
def lcm(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "lcm"
    return distilled(tiny_diffusion, folder, diffusers.LatentConsistencyModelPipeline, requires_safety_checker=False)


@pytest.fixture(scope="module")
def lcm_xl(tiny_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "lcm-xl"
    return distilled(tiny_xl, folder, diffusers.StableDiffusionXLPipeline)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    return {}


def opened(folder: Path, bundles: dict[Path, Path], target: str, tmp_path_factory: Any) -> LoadedModel:
    """The checkpoint's bundle, built once, on a target."""
    if folder not in bundles:
        bundles[folder] = cast(str(folder), tmp_path_factory.mktemp("bundles") / folder.name)
    return load_model(bundles[folder], target)


def compare(
    pipe: Any, model: LoadedModel, request: ImageRequest, patch: pytest.MonkeyPatch, config: Any = None
) -> Array:
    """Draw both from the same noise, in the same order, and return the picture. The pipeline is drawn from `config`,
    if there is one.
    """
    assert request.seed is not None
    edge, stream = pipe.unet.config.sample_size, random_stream(request.seed)
    noise = stream.standard_normal((1, 4, edge, edge), np.float32)

    def fresh(shape: Any, **_: Any) -> torch.Tensor:
        return torch.from_numpy(stream.standard_normal(tuple(shape), np.float32))

    for module in NOISES:
        patch.setattr(f"diffusers.schedulers.{module}.randn_tensor", fresh)
    pipe.set_progress_bar_config(disable=True)
    negative = {} if "Consistency" in type(pipe).__name__ else {"negative_prompt": request.negative_prompt}
    wanted = pipe(
        request.prompt, num_inference_steps=request.steps, latents=torch.from_numpy(noise), output_type="np",
        guidance_scale=request.guidance_scale, height=edge * pipe.vae_scale_factor, width=edge * pipe.vae_scale_factor,
        **negative,
    ).images[0]  # fmt: skip
    root = model.bundle.root
    pipeline = model.pipeline if config is None else DiffusionPipeline.open(root, config)
    (ready,) = (event for event in drive(pipeline(request), model.engines) if isinstance(event, ImageReady))
    differ = np.abs(np.round(wanted * 255) - ready.image.astype(float))
    print(f"{model.target}: {(differ > 0).mean():.4f} of the values differ, at most by {differ.max()}")
    assert differ.max() <= 1 and (differ > 0).mean() < 0.02 and wanted.std() > 0.05
    return ready.image


def text_only(pipe: Any) -> Any:
    """Without the check that edges are multiples of 8 pixels, whatever the VAE's factor is."""
    pipe.check_inputs = lambda *_, **__: None
    return pipe


def test_a_latent_consistency_model(
    lcm: Path, bundles: dict[Path, Path], target: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = text_only(diffusers.LatentConsistencyModelPipeline.from_pretrained(lcm, dtype=torch.float32))
    request = ImageRequest("a red circle", steps=4, guidance_scale=8.5, seed=3)
    with closing(opened(lcm, bundles, target, tmp_path_factory)) as model:
        usual = ImageRequest("a red circle", seed=3)
        assert np.array_equal(compare(theirs, model, request, monkeypatch), drawn(model, usual))
        other = ImageRequest("a red circle", steps=4, guidance_scale=1.0, seed=3)
        assert (drawn(model, other) != drawn(model, usual)).mean() > 0.02  # the scale counts
        plain = text_only(diffusers.StableDiffusionPipeline(**theirs.components, requires_safety_checker=False))
        compare(plain, model, request, monkeypatch)


@pytest.mark.full
def test_one_of_xl(
    lcm_xl: Path, bundles: dict[Path, Path], target: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = text_only(
        diffusers.StableDiffusionXLPipeline.from_pretrained(lcm_xl, dtype=torch.float32, add_watermarker=False)
    )
    with closing(opened(lcm_xl, bundles, target, tmp_path_factory)) as model:
        compare(theirs, model, ImageRequest("a red circle", steps=4, guidance_scale=8.0, seed=3), monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("case", SCHEDULES)
def test_stable_diffusion_2(
    tiny_v2: Path, bundles: dict[Path, Path], case: str, tmp_path: Path, tmp_path_factory: Any, target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The text encoder of OpenCLIP without its last layer, linear projections, v-prediction; Turbo draws in one step
    and without guidance.
    """
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_v2, dtype=torch.float32)
    name, fields = SCHEDULES[case]
    pipe.scheduler = getattr(diffusers, name)(**BETAS, **fields)
    pipe.save_pretrained(tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    steps, scale = (1, 0.0) if case == "turbo" else (6, 4.0)
    theirs = text_only(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32))
    with closing(opened(tiny_v2, bundles, target, tmp_path_factory)) as model:
        request = ImageRequest("a red circle", negative_prompt="blue", steps=steps, guidance_scale=scale, seed=5)
        compare(theirs, model, request, monkeypatch, family_of(source).config(source))
        if case == "turbo":
            several = ImageRequest("a red circle", steps=3, guidance_scale=0.0, seed=5)
            compare(theirs, model, several, monkeypatch, family_of(source).config(source))


def drawn(model: LoadedModel, request: ImageRequest) -> Array:
    (ready,) = (event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady))
    return ready.image
