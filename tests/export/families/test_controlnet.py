"""Control networks beside Stable Diffusion, from their checkpoints to the picture, on every engine, against diffusers'
own pipelines.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import export.build.parts
from calibration.observe.metrics import PEAK, psnr_db
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array
from runtime.diffusion.guides import Control
from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.solver import make_sampler
from runtime.diffusion.variation import random_stream
from runtime.errors import InvalidInput, UnsupportedModel
from runtime.placing.loading import LoadedModel, open_pipeline
from runtime.tasks.image import ImageRequest
from tests.export.checkpoint.original import write_control
from tests.export.families.conftest import drawn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch tensors inside diffusers
NAMES = ("edges", "depth")
PIPELINES = {"tiny_diffusion": "StableDiffusionControlNetPipeline", "tiny_xl": "StableDiffusionXLControlNetPipeline"}
PICTURES = [np.random.default_rng(i).integers(0, 255, (16, 24, 3), dtype=np.uint8) for i in range(2)]
REQUEST = ImageRequest("a large red circle", "blue", 24, 16, steps=5, guidance_scale=4.0, seed=3)
ONE = (Control("edges", PICTURES[0]),)
TWO = (Control("depth", PICTURES[1], 0.5, 0.2, 0.7), Control("edges", PICTURES[0], 0.8, 0.0, 0.5))
REQUESTS = {
    "one": replace(REQUEST, controls=ONE),
    "two, from start to end": replace(REQUEST, controls=TWO),
    "no guidance": replace(REQUEST, controls=ONE, guidance_scale=1.0),
    "a size of odd latents": replace(REQUEST, controls=TWO, width=22, height=18),
    "a control that is resized": replace(REQUEST, controls=(Control("depth", PICTURES[1][:10, :10]),)),
}


def networks(source: Path, folder: Path) -> tuple[Addition, ...]:
    """Two control networks for a checkpoint, of random float16 weights, large enough to be seen."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        network: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        with torch.no_grad():
            for own, parameter in network.named_parameters():
                if own.startswith("controlnet_"):
                    parameter.normal_(0, 0.3)
        network.half().save_pretrained(folder / name)
    return tuple(Addition("controlnet", folder / name) for name in NAMES)


@pytest.fixture(scope="module")
def additions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Addition, ...]:
    return networks(source, tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def theirs(kind: str, source: Path, additions: tuple[Addition, ...]) -> Callable[[ImageRequest], Array]:
    """What diffusers' pipeline draws from the same noise."""
    import diffusers

    models = {one.name: diffusers.ControlNetModel.from_pretrained(one.path) for one in additions}
    more = {"add_watermarker": False} if kind == "tiny_xl" else {"safety_checker": None}
    pipeline: Any = getattr(diffusers, PIPELINES[kind])
    pipe = pipeline.from_pretrained(source, controlnet=list(models.values()), dtype=torch.float32, **more)
    pipe.set_progress_bar_config(disable=True)

    def draw(request: ImageRequest) -> Array:
        pipe.controlnet.nets = torch.nn.ModuleList(models[control.name] for control in request.controls)
        assert request.width is not None and request.height is not None
        noise = random_stream(3).standard_normal((1, 4, request.height // 2, request.width // 2), np.float32)
        (image,) = pipe(
            request.prompt,
            image=[Image.fromarray(control.image) for control in request.controls],
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=request.width,
            height=request.height,
            latents=torch.from_numpy(noise),
            controlnet_conditioning_scale=[control.scale for control in request.controls],
            control_guidance_start=[control.start for control in request.controls],
            control_guidance_end=[control.end for control in request.controls],
            output_type="np",
        ).images
        return np.asarray(np.round(image * 255), np.uint8)

    return draw


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ((Control("edge", PICTURES[0]),), "there is no control 'edge': did you mean 'edges'"),
        (ONE * 2, "'edges' is given twice"),
    ],
)
def test_controls_that_do_not_fit_the_bundle(bundle: Path, controls: tuple[Control, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"controls: {message}"):
        open_pipeline(Bundle(bundle))(replace(REQUEST, controls=controls))


def test_networks_of_one_architecture_are_traced_once(
    source: Path, additions: tuple[Addition, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever their folders lay before."""
    file = additions[0].path / "config.json"
    moved = Addition("controlnet", Path(shutil.copytree(file.parent, tmp_path / NAMES[0])))
    (moved.path / file.name).write_text(json.dumps(json.loads(file.read_bytes()) | {"_name_or_path": "elsewhere"}))
    build = Build.open(Options(str(source), tmp_path / "bundle", additions=(moved, additions[1])))
    monkeypatch.setattr(export.build.parts, "cached", lambda key, suffix, make: Path(key))
    graphs = [export.build.parts.traced(build.source, part, build.tools) for part in build.parts]
    assert len(graphs) > 3 and len(set(graphs)) == len(graphs) - 1


def test_a_picture_for_a_bundle_without_networks(xl_bundle: Path) -> None:
    with pytest.raises(InvalidInput, match=r"controls: .* this bundle has none: build it with --controlnet"):
        open_pipeline(Bundle(xl_bundle))(replace(REQUEST, controls=ONE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5, "end": 0.5}, "'edges' is from 0.5 to 0.5, expected a start below the end"),
        ({"end": 1.5}, "is 1.5, expected 0 to 1"),
        ({"start": float("nan")}, "is nan, expected 0 to 1"),
        ({"scale": -1}, "is -1, expected 0 to 10"),
        ({"image": PICTURES[0].astype(float)}, "controls: "),
    ],
)
def test_controls_that_no_bundle_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Control(**{"name": "edges", "image": PICTURES[0], **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cross_attention_dim": 48},
            r"cross_attention_dim 48 \(expected 16\): this control network was made for another",
        ),
        ({"in_channels": 9}, r"in_channels 9 \(expected 4\)"),
        ({"layers_per_block": 2}, r"layers_per_block 2 \(expected 1\)"),
        ({"conditioning_embedding_out_channels": [8, 16, 32]}, "make 2 pixels one latent"),
        ({"global_pool_conditions": True}, "global_pool_conditions True, expected False"),
        ({"_class_name": "ControlNetUnionModel"}, "is of the class ControlNetUnionModel, expected ControlNetModel"),
    ],
)
def test_networks_that_cannot_be_added(
    tiny_diffusion: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """From their config files alone."""
    (one, _) = networks(tiny_diffusion, tmp_path)
    for weights in one.path.glob("*.safetensors"):
        weights.unlink()
    file = one.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    with pytest.raises(UnsupportedModel, match=message):
        Build.open(Options(str(tiny_diffusion), tmp_path / "bundle", additions=(one,)))


def build_of(source: Path, folder: Path, file: Path) -> Build:
    return Build.open(Options(str(source), folder / "bundle", additions=(Addition("controlnet", file, "edges"),)))


def weights_of(build: Build) -> dict[str, Array]:
    (part,) = (part for part in build.parts if part.name == "controlnet.edges")
    return {name: ref.array() for name, ref in build.weights(part).items()}


@pytest.mark.parametrize("layout", ["control_model.", "", "diffusers"])
def test_a_single_file_is_the_network_of_its_folder(tiny_diffusion: Path, tmp_path: Path, layout: str) -> None:
    """In the layout of the original code, with its prefix or without, or under diffusers' names."""
    from diffusers import ControlNetModel

    (one, _) = networks(tiny_diffusion, tmp_path)
    network: Any = ControlNetModel.from_pretrained(one.path, dtype=torch.float16)
    file = tmp_path / "edges.safetensors"
    if layout == "diffusers":
        save_file(network.state_dict(), file)
    else:
        write_control(network, file, layout)
    theirs: Any = ControlNetModel.from_single_file(str(file), config=str(one.path), torch_dtype=torch.float16)
    found = weights_of(build_of(tiny_diffusion, tmp_path, file))
    assert found.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_controlnet": torch.zeros(0)}, "is a Control-LoRA, expected the whole control network"),
        ({"input_blocks.1.1.norm.weight": None}, "norm.weight is None, .*: this control network was made for"),
        ({"input_hint_block.0.weight": None}, "is no control network: expected tensors such as control_model"),
        ({"input_hint_block.4.weight": None}, "in 1 steps, expected as many as make 2 pixels one latent"),
        ({"input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}, r"conv_in.weight is \(8, 9, 3, 3\), expected \(8, 4, 3"),
    ],
)
def test_single_files_that_are_no_network_of_this_model(
    tiny_diffusion: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    from diffusers import ControlNetModel

    (one, _) = networks(tiny_diffusion, tmp_path)
    file = write_control(ControlNetModel.from_pretrained(one.path), tmp_path / "edges.safetensors", "")
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UnsupportedModel, match=message):
        build_of(tiny_diffusion, tmp_path, file)


def test_how_often_samplers_call_the_model_is_diffusers() -> None:
    """Shares of the steps are shares of the scheduler's timesteps there."""
    import diffusers

    config = SchedulerConfig.parse({"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False})
    for name, scheduler in (("heun", "Heun"), ("kdpm2", "KDPM2"), ("euler", "Euler")):
        theirs = getattr(diffusers, f"{scheduler}DiscreteScheduler")()
        theirs.set_timesteps(6)
        assert make_sampler(name, config, 6).calls == len(theirs.timesteps)


@pytest.mark.parametrize("case", REQUESTS)
def test_the_same_picture_as_diffusers(theirs: Callable[[ImageRequest], Array], ours: LoadedModel, case: str) -> None:
    wanted, got = theirs(REQUESTS[case]), drawn(ours, REQUESTS[case])
    print(f"{ours.target}, {case}: {psnr_db(wanted, got, PEAK):.1f} dB")
    assert psnr_db(wanted, got, PEAK) > 40 and wanted.std() > 20
    without = replace(REQUESTS[case], controls=())
    assert psnr_db(wanted, drawn(ours, without), PEAK) < 30, "the controls are seen"
