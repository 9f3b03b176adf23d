"""Checkpoints that tests share, each made once in a process; bundles, each made once in a run; and a cache of build
steps that is not the user's.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import typer

from runtime.engine import targets

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a suite started in the background ignores it, and so would what tests interrupt
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for each core: more threads of torch only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# An example takes longer beside other work. The examples of `make test` are the same each time, so that equal sources
# give equal results; `make test-full` draws new ones.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("enginecast", hypothesis.settings.get_profile("explore"), derandomize=True)
hypothesis.settings.load_profile("enginecast")
SAMPLES = Path(__file__).parents[1] / "samples"
MANY = 50_000
"""Objects that the garbage collector looks at, beyond those of the tests of one file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of tests that build come first, then those in this folder itself, whose programs take long: a long one
    that began last would run alone at the end.
    """
    here = Path(__file__).parent
    items.sort(key=lambda item: (not item.path.is_relative_to(here / "export"), item.path.parent != here))


def pytest_collection_finish() -> None:
    """All that the collected tests imported stays until the end: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What tests import later stays, too. Of a large heap, each collection that a test or a server asks for takes a
    third of a second.
    """
    if len(gc.get_objects()) > MANY:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def commands() -> Iterator[None]:
    """Commands are made of their functions once in a process: typer takes longer for that than most commands do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_command", "get_group"):
            patch.setattr(typer.main, name, functools.cache(getattr(typer.main, name)))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of a run share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def build_cache(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the builds of all processes keep finished steps: a graph is traced once in a run."""
    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINECAST_CACHE", str(folder))
        patch.setenv("ENGINECAST_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv(
            "ENGINECAST_CHOICES", "default"
        )  # tests compare what engines compute, also where timing would decide otherwise
        yield folder


@pytest.fixture
def own_cache(build_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, with the graphs that are finished: for tests of what a build leaves there."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ENGINECAST_CACHE", str(folder))
    link_graphs(build_cache, folder)
    return folder


def link_graphs(cache: Path, folder: Path) -> None:
    """Put the finished graphs of a cache into another."""
    folder.mkdir(exist_ok=True)
    for graph in cache.glob("*.onnx"):
        if "." not in graph.stem and not (folder / graph.name).exists():
            (folder / graph.name).hardlink_to(graph)


@pytest.fixture(scope="session")
def bundles(shared: Path) -> Path:
    """Where the bundles lie that all processes of a run share."""
    folder = shared / "bundles"
    folder.mkdir(exist_ok=True)
    return folder


def cast(source: str, output: Path, **additions: Path) -> Path:
    """An unquantized bundle for every usable target, built by the first process that needs it. `additions` are files by
    their kind. Imported late: tests of the device side must not need the build side.
    """
    from filelock import FileLock

    from export.build.build import build
    from export.build.options import Options
    from export.checkpoint.additions import Addition

    added = tuple(Addition(kind, path) for kind, path in additions.items())
    usable = tuple(name for name, engine in targets().items() if engine.available().usable)
    with FileLock(f"{output}.lock"):
        if not output.exists():
            agreement = "none" if added else "auto"  # what is added is compared in tests of it
            build(Options(source, output, targets=usable, additions=added, agreement=agreement))
    return output


@pytest.fixture(scope="session")
def diffusion_bundle(bundles: Path) -> Path:
    """The bundle of sample:shapes-diffusion, unquantized. Tests that alter it take a copy."""
    return cast("sample:shapes-diffusion", bundles / "shapes-diffusion")


@pytest.fixture(scope="session")
def vlm_bundle(bundles: Path) -> Path:
    """The bundle of sample:shapes-vlm, unquantized. Tests that alter it take a copy."""
    return cast("sample:shapes-vlm", bundles / "shapes-vlm")


@pytest.fixture(scope="session")
def drafted_bundle(bundles: Path) -> Path:
    """The same with the draft that was trained for it."""
    draft = SAMPLES / "shapes-additions" / "next.safetensors"
    return cast("sample:shapes-vlm", bundles / "shapes-vlm-drafted", draft=draft)


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion of some ten thousand float16 parameters in the diffusers layout: quick to build, draws
    noise.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("sources") / "tiny-diffusion"
    sample = SAMPLES / "shapes-diffusion"
    torch.manual_seed(0)
    tokens = json.loads((sample / "text_encoder" / "config.json").read_bytes())
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            **{key: tokens[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
                "pad_token_id")},
        )
    )  # fmt: skip
    unet: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    for name, model in (("text_encoder", text), ("unet", unet), ("vae", vae)):
        model.half().save_pretrained(folder / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(sample / name, folder / name)
    shutil.copy(sample / "model_index.json", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v2(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 2.x as published for 768 pixels: OpenCLIP's text encoder, which pads with another
    token, linear projections, heads of one width, and v-prediction.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sources") / "tiny-v2"
    torch.manual_seed(0)
    tokens = json.loads((tiny_diffusion / "text_encoder" / "config.json").read_bytes())
    ids = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
            projection_dim=12, **{key: tokens[key] for key in ids},
        )
    )  # fmt: skip
    unet: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=24,
        attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    base = StableDiffusionPipeline.from_pretrained(tiny_diffusion, torch_dtype=torch.float16)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(tiny_diffusion / "tokenizer", pad_token="!")
    StableDiffusionPipeline(
        base.vae, text.half(), tokenizer, unet.half(), scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion XL of some ten thousand float16 parameters, in the diffusers layout, with every part of
    the published one.

    As published, its second tokenizer pads with another token than the first.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sources") / "tiny-xl"
    sample = SAMPLES / "shapes-diffusion"
    torch.manual_seed(0)
    tokens = json.loads((sample / "text_encoder" / "config.json").read_bytes())
    ids = {
        key: tokens[key]
        for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = CLIPTextModel(CLIPTextConfig(hidden_size=16, **layers, **ids))
    text_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=24, projection_dim=12, hidden_act="gelu", **layers, **ids)
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=[2, 4],
        cross_attention_dim=40,
        transformer_layers_per_block=[1, 1], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    first, second = (
        CLIPTokenizer.from_pretrained(sample / "tokenizer"),
        CLIPTokenizer.from_pretrained(sample / "tokenizer", pad_token="!"),
    )
    pipeline = StableDiffusionXLPipeline(
        vae.half(), text.half(), text_2.half(), first, second, unet.half(), add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading"),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl_bundle(tiny_xl: Path, bundles: Path) -> Path:
    """The bundle of `tiny_xl`. Tests that alter it take a copy."""
    return cast(str(tiny_xl), bundles / "tiny-xl")


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of two layers with grouped heads, float16, in the transformers layout under its library's own
    names.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("sources") / "tiny-vlm"
    sample = SAMPLES / "shapes-vlm"
    config = json.loads((sample / "config.json").read_bytes())
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config["text_config"] |= small | {"num_key_value_heads": 2, "head_dim": 8}
    config["vision_config"] |= small | {"image_size": 32}
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).half()
    model.save_pretrained(folder, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(sample / name, folder)
    processor = json.loads((sample / "processor_config.json").read_bytes())
    processor["image_processor"] |= {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_vlm: Path, bundles: Path) -> Path:
    """The bundle of `tiny_vlm`. Tests that alter it take a copy."""
    return cast(str(tiny_vlm), bundles / "tiny-vlm")


@pytest.fixture(scope="session")
def tiny_blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP-2 with an OPT decoder, float16."""
    from tests.export.families.blip import OPT, save

    return save(tmp_path_factory.mktemp("sources") / "tiny-blip2", OPT)


@pytest.fixture(scope="session")
def tiny_blip2_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP-2 with a T5, float16."""
    from tests.export.families.blip import T5, save

    return save(tmp_path_factory.mktemp("sources") / "tiny-blip2-t5", T5)


@pytest.fixture(scope="session")
def tiny_instructblip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random InstructBLIP with a Llama, float16."""
    from tests.export.families.blip import LLAMA, save_instruct

    return save_instruct(tmp_path_factory.mktemp("sources") / "tiny-instructblip", LLAMA)


@pytest.fixture(scope="session")
def tiny_instructblip_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random InstructBLIP with a T5, float16."""
    from tests.export.families.blip import T5, save_instruct

    return save_instruct(tmp_path_factory.mktemp("sources") / "tiny-instructblip-t5", T5)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of three layers, float16, with the tokenizer of the sample that draws."""
    from tests.export.families.embedding import save_clip

    return save_clip(tmp_path_factory.mktemp("sources") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP of three layers, random weights."""
    from tests.export.families.embedding import save_siglip

    return save_siglip(tmp_path_factory.mktemp("sources") / "tiny-siglip")


@pytest.fixture(scope="session")
def tiny_blip2_retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP-2 that embeds and matches, float16."""
    from tests.export.families.embedding import save_retrieval

    return save_retrieval(tmp_path_factory.mktemp("sources") / "tiny-blip2-retrieval")


@pytest.fixture(params=sorted(targets()))
def target(request: pytest.FixtureRequest) -> str:
    """Each target there is; skips with the reason where it cannot be used."""
    found = targets()[request.param].available()
    if not found.usable:
        pytest.skip(f"{request.param}: {found.reason}")
    return str(request.param)
