"""The refiner of Stable Diffusion XL as a second stage: the same pictures as diffusers' two pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.solver import Walk, make_sampler
from runtime.diffusion.variation import random_stream
from runtime.engine import FakeEngine
from runtime.errors import InvalidInput, UnsupportedModel
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline, encoders_of
from runtime.placing.loading import load_model
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.python.requests import going_on
from serving.dialects.python.results import Drawing
from serving.host.job import Done
from tests.runtime.diffusion.reference import reference
from tests.runtime.pipelines.test_canvas import TARGETS, drawn, engines_of, library, request_of
from tests.runtime.pipelines.test_diffusion import psnr

pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning", "ignore::FutureWarning")
EDGE, SHARE, LEAST_DB = 16, 0.6, 40
BASE = ImageRequest("a red circle", "blue", EDGE, EDGE, steps=8, guidance_scale=3.0, seed=3, denoising_end=SHARE)
Models = Mapping[str, Any]
UNET = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


@pytest.fixture(scope="session")
def tiny_refiner(tiny_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random refiner, in the layout of the published one: no first text encoder, a score in time_ids."""
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_xl, dtype=torch.float32)
    torch.manual_seed(2)
    config = {key: value for key, value in base.unet.config.items() if key[0] != "_"}
    unet = diffusers.UNet2DConditionModel(
        **config | {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 8 + 12}
    )
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        base.vae, None, base.text_encoder_2, None, base.tokenizer_2, unet, base.scheduler, add_watermarker=False,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sources") / "tiny-refiner"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tiny_xl: Path, tiny_refiner: Path) -> Mapping[str, Any]:
    kinds = {tiny_xl: diffusers.StableDiffusionXLPipeline, tiny_refiner: diffusers.StableDiffusionXLImg2ImgPipeline}
    pipes = {folder.name: kind.from_pretrained(folder, dtype=torch.float32) for folder, kind in kinds.items()}
    for pipe in pipes.values():
        pipe.watermark = None
        pipe.set_progress_bar_config(disable=True)
    return pipes


@dataclass(frozen=True)
class Torch:
    """A checkpoint as its family describes it, its submodels computed by diffusers' own modules."""

    pipeline: DiffusionPipeline
    engines: Mapping[str, Any]


def as_torch(source: Path, pipe: Any) -> Torch:
    """A bundle's pipeline without the build."""
    found = resolve(str(source))
    config = DiffusionConfig.parse(family_of(found).config(found))
    pipeline = DiffusionPipeline(config, *(source / encoder.tokenizer for encoder in encoders_of(config)))

    def text(name: str) -> FakeEngine:
        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            with torch.no_grad():
                output = getattr(pipe, name)(torch.from_numpy(inputs["input_ids"]), output_hidden_states=True)
            states = {"penultimate_hidden_state": output.hidden_states[-2].numpy()}
            return states | ({"text_embeds": output.text_embeds.numpy()} if name == "text_encoder_2" else {})

        return FakeEngine(run)

    def denoise(inputs: Mapping[str, Array]) -> dict[str, Array]:
        x, time, states, pooled, ids = (torch.from_numpy(np.asarray(inputs[name])) for name in UNET)
        with torch.no_grad():
            added = {"text_embeds": pooled, "time_ids": ids}
            return {"noise_pred": pipe.unet(x, time, states, added_cond_kwargs=added).sample.numpy()}

    engines = engines_of(pipe) | {encoder.submodel: text(encoder.submodel) for encoder in encoders_of(config)}
    return Torch(pipeline, engines | {"unet": FakeEngine(denoise)})


@pytest.fixture(scope="module")
def models(tiny_xl: Path, tiny_refiner: Path, theirs: Mapping[str, Any]) -> Models:
    return {source.name: as_torch(source, theirs[source.name]) for source in (tiny_xl, tiny_refiner)}


def two_stages(pipes: Mapping[str, Any], request: ImageRequest) -> Any:
    """What both pipelines of diffusers draw, one after the other, from our noise."""
    for pipe in pipes.values():
        pipe.scheduler = reference(str(request.sampler), dict(pipe.scheduler.config))
    assert request.seed is not None
    noise = random_stream(request.seed).standard_normal((1, 4, EDGE // 2, EDGE // 2), np.float32)
    shared = {"prompt": request.prompt, "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps, "guidance_scale": request.guidance_scale}  # fmt: skip
    latents = pipes["tiny-xl"](
        **shared, width=EDGE, height=EDGE, latents=torch.from_numpy(noise), denoising_end=SHARE, output_type="latent"
    ).images
    images = pipes["tiny-refiner"](**shared, image=latents, denoising_start=SHARE, output_type="np").images
    return latents.numpy(), np.asarray((images[0] * 255).round(), np.uint8)


def ready(model: Any, request: ImageRequest) -> ImageReady:
    (found,) = (one for one in drive(model.pipeline(request), model.engines) if isinstance(one, ImageReady))
    return found


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
def test_two_stages_as_in_diffusers(models: Models, theirs: Mapping[str, Any], sampler: str) -> None:
    request = replace(BASE, sampler=sampler)
    between, expected = two_stages(theirs, request)
    first = ready(models["tiny-xl"], request)
    assert first.latents is not None
    schedule = models["tiny-xl"].pipeline.config.sampler_of(request).schedule
    scale = schedule.scale(schedule.point(schedule.steps.stop))
    assert psnr_of(first.latents * scale, between[0]) >= LEAST_DB
    second = ready(models["tiny-refiner"], going_on(request, Drawing((first,), Done(0, 0, None, (), ()))))
    assert expected.std() > 10 and psnr(np.asarray(second.image), expected) >= LEAST_DB
    assert second.seed == first.seed and second.latents is None


def psnr_of(ours: Any, theirs: Any) -> float:
    return float(20 * np.log10(np.abs(theirs).max() / np.sqrt(((ours - theirs) ** 2).mean())))


def test_the_refiner_draws_on_a_picture_as_in_diffusers(
    models: Models, theirs: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("euler", strength=0.5)
    expected = library(theirs["tiny-refiner"], request, monkeypatch)
    model = models["tiny-refiner"]
    assert expected.std() > 10 and psnr(drawn(model.pipeline, model.engines, request), expected) >= LEAST_DB


@pytest.mark.parametrize("after", ["euler", "ddim", "dpmpp_2m"])
def test_stages_may_have_samplers_of_another_scale(after: str) -> None:
    """What the second model receives first is what the first one handed over, whatever both samplers hold."""
    from tests.runtime.diffusion.test_samplers import SD15, published

    base = make_sampler("euler", published("euler", SD15), 11).between(0, SHARE, 1000)
    rest = make_sampler(after, published(after, SD15), 11).between(SHARE, 1, 1000)
    latents = np.random.default_rng(0).standard_normal((1, 4, 2, 2), np.float32)
    handed = base.handed_over(latents)
    assert np.abs(handed).max() < np.abs(latents).max() / 1.2
    np.testing.assert_allclose(Walk(rest, handed, lambda: handed).x, handed, rtol=1e-5)


def test_a_score_replaces_the_size_aimed_at(models: Models) -> None:
    pipeline = models["tiny-refiner"].pipeline
    with pytest.raises(InvalidInput, match=r"^target_size: .*takes a score instead"):
        pipeline(ImageRequest("ab", target_size=(8, 8)))
    with pytest.raises(InvalidInput, match=r"^aesthetic_score: .*takes a target_size instead"):
        models["tiny-xl"].pipeline(ImageRequest("ab", aesthetic_score=5.0))
    with pytest.raises(InvalidInput, match=r"^negative_aesthetic_score: is 11.0, expected 0 to 10"):
        ImageRequest("ab", negative_aesthetic_score=11.0)


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_built_stages_draw_as_in_diffusers(
    tiny_xl: Path, tiny_refiner: Path, theirs: Mapping[str, Any], tmp_path: Path, target: str
) -> None:
    request = replace(BASE, sampler="euler")
    _, expected = two_stages(theirs, request)
    for source in (tiny_xl, tiny_refiner):
        bundle, _ = build(Options(str(source), tmp_path / source.name, targets=(target,)))
        model = load_model(tmp_path / source.name)
        found = ready(model, request)
        request = (
            going_on(request, Drawing((found,), Done(0, 0, None, (), ()))) if found.latents is not None else request
        )
        model.close()
    assert [part.name for part in bundle.manifest.submodels] == ["text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
    assert psnr(np.asarray(found.image), expected) >= LEAST_DB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requires_aesthetics_score": False}, r"projection_class_embeddings_input_dim 52 \(expected 60\)"),
        ({"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ],
)
def test_what_does_not_fit_is_named(tiny_refiner: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(tiny_refiner, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_bytes())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(UnsupportedModel, match=message):
        Build.open(Options(str(folder), tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "pndm", "euler_ancestral", "unipc"])
@pytest.mark.parametrize("share", [0.3, 0.75, 0.8])
def test_the_steps_of_both_parts_are_those_of_diffusers(name: str, share: float, tiny_xl: Path) -> None:
    from tests.runtime.diffusion.test_samplers import SD15, published

    sampler = make_sampler(name, published(name, SD15), 11)
    base, rest = sampler.between(0, share, 1000).schedule, sampler.between(share, 1, 1000).schedule
    cutoff = round(1000 - share * 1000)
    assert (base.time[base.steps] >= cutoff).all() and (rest.time[rest.steps] < cutoff).all()
    assert [*base.steps, *rest.steps] == list(range(11))


def test_a_part_without_steps_is_refused() -> None:
    from tests.runtime.diffusion.test_samplers import SD15, published

    sampler = make_sampler("ddim", published("ddim", SD15), 4)
    with pytest.raises(InvalidInput, match=r"^denoising_end: leaves none of 4 steps"):
        sampler.between(0, 0.1, 1000)
    with pytest.raises(InvalidInput, match=r"^denoising_start: leaves none of 4 steps"):
        sampler.between(0.999, 1, 1000)
