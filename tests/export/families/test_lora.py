"""Bundles with LoRA files in their weights draw what diffusers draws after load_lora_weights and fuse_lora."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.diffusion.variation import random_stream
from runtime.engine import targets
from runtime.errors import InvalidInput, SourceError
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.image import ImageReady, ImageRequest
from tests.export.checkpoint import loras

pytest.importorskip("peft", reason="diffusers reads LoRA files with it")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # torch tensors inside diffusers
REQUEST = ImageRequest("a large red circle", "blue", 16, 24, steps=3, guidance_scale=3.0, seed=3)
USABLE = tuple(name for name, engine in targets().items() if engine.available().usable)


def pipeline(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models(pipe: Any) -> dict[str, Any]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def attention(path: str) -> bool:
    return "to_" in path or "_proj" in path or ".ff." in path or ".mlp." in path


def everything(path: str) -> bool:
    return True


def drawn(model: LoadedModel, request: ImageRequest) -> Array:
    (ready,) = (event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady))
    return ready.image


def expected(pipe: Any, request: ImageRequest = REQUEST) -> Array:
    assert request.width is not None and request.height is not None and request.seed is not None
    noise = random_stream(request.seed).standard_normal((1, 4, request.height // 2, request.width // 2), np.float32)
    images = pipe(
        request.prompt, negative_prompt=request.negative_prompt or None, num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale, width=request.width, height=request.height,
        latents=torch.from_numpy(noise), output_type="np",
    ).images  # fmt: skip
    return np.asarray(np.round(images[0] * 255), np.uint8)


def decibels(wanted: Array, got: Array) -> float:
    noise = float(((wanted.astype(float) - got.astype(float)) ** 2).mean())
    return 10 * np.log10(255**2 / noise) if noise else 300.0


@pytest.fixture(scope="module", params=["tiny_diffusion", pytest.param("tiny_xl", marks=pytest.mark.full)])
def source(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def files(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of each layout: with convolutions, and with ranks that differ from layer to layer."""
    folder, parts = tmp_path_factory.mktemp("loras"), models(pipeline(source))
    original = "text_encoder_2" in parts
    first = loras.of_kohya(folder / "first.safetensors", parts, everything, original=original)
    return first, loras.of_diffusers(folder / "second.safetensors", parts, attention, ranks=(2, 4, 3))


@pytest.fixture(scope="module")
def fused_bundle(source: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    additions = (Addition("lora", files[0], scale=0.4), Addition("lora", files[1], scale=0.5))
    output = tmp_path_factory.mktemp("bundles") / "fused"
    return build(Options(str(source), output, targets=USABLE, additions=additions))[0]


@pytest.fixture(scope="module")
def theirs(source: Path, files: tuple[Path, Path]) -> Iterator[tuple[Array, Array]]:
    """diffusers' picture without and with the files."""
    pipe = pipeline(source)
    before = expected(pipe)
    loras.fused(pipe, (files[0], 0.4), (files[1], 0.5))
    yield before, expected(pipe)


def test_fused_bundles_draw_what_diffusers_draws(
    fused_bundle: Bundle, theirs: tuple[Array, Array], target: str
) -> None:
    before, wanted = theirs
    with closing(load_model(fused_bundle.root, target)) as model:
        got = drawn(model, REQUEST)
    found = decibels(wanted, got)
    print(f"{fused_bundle.name} on {target}: {found:.1f} dB, without LoRA {decibels(before, got):.1f} dB")
    assert found >= 40 and decibels(before, got) < 30


def test_the_manifest_states_what_was_added(fused_bundle: Bundle) -> None:
    added = fused_bundle.manifest.source.additions
    assert [(one.kind, one.name, one.scale) for one in added] == [("lora", "first", 0.4), ("lora", "second", 0.5)]
    assert len({one.fingerprint for one in added}) == 2


def test_files_and_scales_are_part_of_the_key(tiny_diffusion: Path, tmp_path: Path) -> None:
    def key(*additions: Addition) -> str:
        return Build.open(Options(str(tiny_diffusion), tmp_path / "b", additions=additions)).key

    unet = {"unet": models(pipeline(tiny_diffusion))["unet"]}
    first = loras.of_diffusers(tmp_path / "first.safetensors", unet, attention)
    second = loras.of_diffusers(tmp_path / "second.safetensors", unet, attention, ranks=(2,))
    keys = [key(Addition("lora", first)), key(Addition("lora", second, "first")), key(Addition("lora", first, scale=2))]
    assert len(set(keys)) == 3


def test_a_lora_of_another_model_is_refused_before_any_work(tiny_diffusion: Path, tmp_path: Path) -> None:
    other = {"unet": torch.nn.ModuleDict({"other": torch.nn.Linear(4, 4)})}
    path = loras.of_diffusers(tmp_path / "other.safetensors", other, everything)
    with pytest.raises(SourceError, match=r"1 \(unet\.other\) which no layer of this StableDiffusionPipeline"):
        build(Options(str(tiny_diffusion), tmp_path / "b", additions=(Addition("lora", path),)))
    assert not (tmp_path / "b").exists()


def test_other_families_refuse_a_lora(tiny_vlm: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    with pytest.raises(InvalidInput, match="lora: does not apply to a LlavaForConditionalGeneration"):
        build(Options(str(tiny_vlm), tmp_path / "b", additions=(Addition("lora", path),)))


# Chosen by each request


@pytest.fixture(scope="module")
def switched(source: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    additions = tuple(Addition("adapter", path) for path in files)
    output = tmp_path_factory.mktemp("bundles") / "switched"
    return build(Options(str(source), output, targets=USABLE, additions=additions))[0]


@pytest.fixture(scope="module")
def chosen(source: Path, files: tuple[Path, Path]) -> dict[str, tuple[dict[str, float], Array]]:
    """diffusers' pictures: no LoRA, each of them, both."""
    cases = ({}, {"first": 0.4}, {"second": -0.5}, {"first": 0.3, "second": 0.5})
    found = {}
    for scales in cases:
        pipe = pipeline(source)
        loras.fused(pipe, *((path, scales[path.stem]) for path in files if path.stem in scales))
        found[" and ".join(scales) or "none"] = scales, expected(pipe)
    return found


@pytest.mark.full
def test_requests_choose_loras_as_diffusers_fuses_them(
    switched: Bundle, chosen: dict[str, tuple[dict[str, float], Array]], target: str
) -> None:
    with closing(load_model(switched.root, target)) as model:
        drew = {case: drawn(model, replace(REQUEST, loras=scales)) for case, (scales, _) in chosen.items()}
        found = {case: decibels(wanted, drew[case]) for case, (_, wanted) in chosen.items()}
        print(f"{switched.name} on {target}: {found}")
        assert min(found.values()) >= 40
        assert max(decibels(drew["none"], drew[case]) for case in list(drew)[1:]) < 36
        again = drawn(model, replace(REQUEST, loras=chosen["first"][0]))
        assert (again == drew["first"]).all()
        with pytest.raises(InvalidInput, match=r"there is no LoRA 'third': .*first"):
            model.pipeline(replace(REQUEST, loras={"third": 1.0}))


@pytest.mark.full
def test_int8_weights_keep_their_branches(source: Path, files: tuple[Path, Path], tmp_path: Path, target: str) -> None:
    additions = tuple(Addition("adapter", path) for path in files)
    options = Options(str(source), tmp_path / "b", (target,), "int8", additions=additions, allow_low_quality=True)
    bundle, _ = build(options)
    assert "int8" in str(bundle.submodel("unet").precision)
    with closing(load_model(bundle.root, target)) as model:
        none, first, second, again = (
            drawn(model, replace(REQUEST, loras=scales))
            for scales in ({}, {"first": 0.5}, {"second": 0.5}, {"first": 0.5})
        )
    assert (first == again).all()
    assert max(decibels(none, first), decibels(none, second), decibels(first, second)) < 36
