"""The diffusion pipeline: its logic on fake engines, and its pictures against diffusers' on the same
modules and noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.solver import solvers
from runtime.diffusion.variation import random_stream
from runtime.engine import FakeEngine
from runtime.errors import BundleError, EngineError, InvalidInput
from runtime.pipeline import Call, Progress, drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.tasks.image import CONDITIONS, ImageReady, ImageRequest
from tests.runtime.diffusion.reference import WITH_ETA, feed, reference

pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning")  # torch tensors inside diffusers
SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-diffusion"
LIMIT = 16
HIDDEN = 8
CONFIG: dict[str, Any] = {
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "vae": {"scaling_factor": 0.5, "scale_factor": 2, "latent_channels": 4},
    "sizes": {"min": 8, "max": 64, "default": 16, "multiple": 4},
    "defaults": {"steps": 4, "guidance_scale": 3.0},
}
NEAREST_DB = 40.0
PINNED = [0.18170499801635742, -1.2426389455795288, -0.5515530109405518]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder that spells words letter by letter."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, "ab"])}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": LIMIT, "tokenizer_class": "CLIPTokenizer"})
    )
    return folder


@pytest.fixture(scope="module")
def pipeline(tokenizer: Path) -> DiffusionPipeline:
    return DiffusionPipeline(DiffusionConfig.parse(CONFIG), tokenizer)


def fakes() -> dict[str, FakeEngine]:
    """Engines with the shapes of a real model: a UNet that shrinks what it gets, a VAE that repeats pixels."""

    def encode(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"last_hidden_state": np.repeat(inputs["input_ids"][..., None], HIDDEN, axis=2).astype(np.float32) / 100}

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        told = inputs["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
        return {"noise_pred": np.asarray(inputs["sample"], np.float32) * np.float32(0.5) + told}

    def decode(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"image": inputs["latents"][:, :3].repeat(2, axis=2).repeat(2, axis=3)}

    return {"text_encoder": FakeEngine(encode), "unet": FakeEngine(predict), "vae_decoder": FakeEngine(decode)}


def pictures(
    pipeline: DiffusionPipeline, request: ImageRequest, engines: Mapping[str, FakeEngine] | None = None
) -> list[ImageReady]:
    return [event for event in drive(pipeline(request), engines or fakes()) if isinstance(event, ImageReady)]


def test_calls_and_events(pipeline: DiffusionPipeline) -> None:
    engines = fakes()
    events = list(drive(pipeline(ImageRequest("ab", "c", width=24, height=16, seed=7)), engines))
    assert [(event.step, event.total) for event in events if isinstance(event, Progress)] == [
        (i, 4) for i in range(1, 5)
    ]
    (ready,) = [event for event in events if isinstance(event, ImageReady)]
    assert (ready.index, ready.seed, ready.image.shape) == (0, 7, (16, 24, 3)) and ready.image.dtype == np.uint8
    (encoded,) = engines["text_encoder"].calls
    assert encoded["input_ids"].dtype == np.int64 and encoded["input_ids"].shape == (2, LIMIT)
    assert encoded["input_ids"][0, 1] == 28  # the negative prompt, "c</w>", comes first
    assert len(engines["unet"].calls) == 4 and len(engines["vae_decoder"].calls) == 1
    call = engines["unet"].calls[0]
    assert call["sample"].shape == (2, 4, 8, 12) and call["sample"].dtype == np.float32
    assert call["timestep"].tolist() == [751.0, 751.0] and call["timestep"].dtype == np.float32
    assert call["encoder_hidden_states"].shape == (2, LIMIT, HIDDEN)


@pytest.mark.parametrize(("scale", "batch"), [(0.0, 1), (1.0, 1), (1.01, 2)])
def test_guidance_runs_the_negative_prompt_only_above_one(
    pipeline: DiffusionPipeline, scale: float, batch: int
) -> None:
    engines = fakes()
    pictures(pipeline, ImageRequest("ab", guidance_scale=scale, seed=0), engines)
    assert {len(call["sample"]) for call in engines["unet"].calls} == {batch}
    assert len(engines["text_encoder"].calls[0]["input_ids"]) == batch


@pytest.mark.parametrize("sampler", [*solvers(), "euler_karras", "dpmpp_2m_karras"])
def test_a_seed_means_a_picture(pipeline: DiffusionPipeline, sampler: str) -> None:
    """Each picture of a request is the one that its own seed draws alone, with fresh noise on the way or without."""
    request = ImageRequest("ab", sampler=sampler, seed=5, images=3, eta=0.5 if sampler in WITH_ETA else 0.0)
    several = pictures(pipeline, request)
    assert [(ready.index, ready.seed) for ready in several] == [(0, 5), (1, 6), (2, 7)]
    alone = pictures(pipeline, replace(request, seed=6, images=1))
    np.testing.assert_array_equal(several[1].image, alone[0].image)
    assert (several[0].image != several[1].image).any()


def test_a_seed_is_chosen_and_told(pipeline: DiffusionPipeline) -> None:
    (first,), (second,) = pictures(pipeline, ImageRequest("ab")), pictures(pipeline, ImageRequest("ab"))
    assert first.seed != second.seed
    np.testing.assert_array_equal(first.image, pictures(pipeline, ImageRequest("ab", seed=first.seed))[0].image)


def test_the_random_stream_is_pinned() -> None:
    """Seeds are promises: these numbers must never change."""
    np.testing.assert_allclose(random_stream(42).standard_normal(3, np.float32), PINNED, atol=1e-6)


def test_previews(pipeline: DiffusionPipeline) -> None:
    engines = fakes()
    events = list(drive(pipeline(ImageRequest("ab", steps=5, preview_every=2, seed=0)), engines))
    shown = {event.step: event.preview for event in events if isinstance(event, Progress) and event.preview is not None}
    assert list(shown) == [2, 4]
    assert shown[2].shape == (16, 16, 3) and shown[2].dtype == np.uint8
    assert len(engines["vae_decoder"].calls) == 3


def test_progress_counts_all_pictures(pipeline: DiffusionPipeline) -> None:
    events = list(drive(pipeline(ImageRequest("ab", images=2, seed=0)), fakes()))
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(1, 9))
    assert isinstance(events[4], ImageReady) and isinstance(events[-1], ImageReady)


def test_closing_stops_at_once(pipeline: DiffusionPipeline) -> None:
    engines = fakes()
    events = drive(pipeline(ImageRequest("ab", steps=50, seed=0)), engines)
    next(events)
    events.close()
    assert len(engines["unet"].calls) == 1


def test_an_abandoned_call_ends_the_generator(pipeline: DiffusionPipeline) -> None:
    work = pipeline(ImageRequest("ab", seed=0))
    assert isinstance(next(work), Call)
    work.close()
    with pytest.raises(StopIteration):
        next(work)


@pytest.mark.parametrize("submodel", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_and_no_black_picture(
    pipeline: DiffusionPipeline, submodel: str, bad: float
) -> None:
    engines = fakes()
    good = engines[submodel].function

    def spoilt(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = {name: array.copy() for name, array in good(inputs).items()}
        next(iter(outputs.values())).flat[3] = bad
        return outputs

    engines[submodel] = FakeEngine(spoilt)
    with pytest.raises(EngineError, match=f"^{submodel} gave NaN or infinite"):
        pictures(pipeline, ImageRequest("ab", seed=0), engines)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("width", {"width": 18}),
        ("width", {"width": 4}),
        ("width", {"width": 0}),
        ("height", {"height": 68}),
        ("height", {"height": -16}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": 1_000_000}),
        ("steps", {"steps": 1000}),  # timestep 1000 of 0 to 999, by the model's offset of 1
        ("guidance_scale", {"guidance_scale": -1.0}),
        ("guidance_scale", {"guidance_scale": 51.0}),
        ("guidance_scale", {"guidance_scale": math.nan}),
        ("sampler", {"sampler": "eular"}),
        ("eta", {"eta": 2.0}),
        ("eta", {"eta": 0.5, "sampler": "euler"}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63 - 1, "images": 2}),
        ("images", {"images": 0}),
        ("images", {"images": 1000}),
        ("preview_every", {"preview_every": -1}),
        ("prompt", {"prompt": "a " * 20_000}),
        ("negative_prompt", {"negative_prompt": "a " * LIMIT}),
        ("latents", {"latents": np.zeros((2, 4, 8, 8), np.float32)}),
        ("latents", {"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}),
    ],
)
def test_bad_requests_name_the_field_before_any_work(
    pipeline: DiffusionPipeline, field: str, change: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        pipeline(ImageRequest(**({"prompt": "ab"} | change)))
    assert caught.value.field == field


# Conditions added to the prompt's


@pytest.fixture
def added(tokenizer: Path, request: pytest.FixtureRequest) -> DiffusionPipeline:
    """A pipeline with added conditions; its parameter, True unless given, is force_zeros_for_empty_prompt."""
    config = CONFIG | {"added": {"force_zeros_for_empty_prompt": getattr(request, "param", True)}}
    return DiffusionPipeline(DiffusionConfig.parse(config), tokenizer, tokenizer)


def added_fakes() -> dict[str, FakeEngine]:
    """Two text encoders that tell their ids, the second half as wide, and a UNet that heeds everything it is told."""

    def told(inputs: Mapping[str, Array], width: int) -> Array:
        return np.repeat(1 + inputs["input_ids"][..., None], width, axis=2).astype(np.float32) / 100

    def encode_2(inputs: Mapping[str, Array]) -> dict[str, Array]:
        state = told(inputs, HIDDEN // 2)
        return {"penultimate_hidden_state": state, "text_embeds": state[:, 1]}

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        heard = sum(
            inputs[name].reshape(len(inputs["sample"]), -1).mean(axis=1)
            for name in ("encoder_hidden_states", "text_embeds")
        )
        heard = heard + inputs["time_ids"].mean(axis=1) / 1000
        return {"noise_pred": np.asarray(inputs["sample"] * np.float32(0.5) + heard.reshape(-1, 1, 1, 1), np.float32)}

    encode = FakeEngine(lambda inputs: {"penultimate_hidden_state": told(inputs, HIDDEN)})
    return fakes() | {"text_encoder": encode, "text_encoder_2": FakeEngine(encode_2), "unet": FakeEngine(predict)}


def test_added_conditions(added: DiffusionPipeline) -> None:
    engines = added_fakes()
    sizes: dict[str, Any] = {"original_size": (100, 200), "crop_top_left": (3, 4), "target_size": (50, 60)}
    pictures(added, ImageRequest("ab", "c", width=24, height=16, seed=7), engines)
    pictures(added, ImageRequest("ab", "c", width=24, height=16, seed=7, **sizes), engines)
    for name in ("text_encoder", "text_encoder_2"):
        assert [call["input_ids"][:, 1].tolist() for call in engines[name].calls] == [
            [28, 0]
        ] * 2  # the negative prompt, "c</w>", first
    plain, told = engines["unet"].calls[0], engines["unet"].calls[-1]
    assert plain["encoder_hidden_states"].shape == (2, LIMIT, HIDDEN + HIDDEN // 2) and plain["text_embeds"].shape == (
        2,
        HIDDEN // 2,
    )
    assert plain["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2 and plain["time_ids"].dtype == np.float32
    assert told["time_ids"].tolist() == [[100, 200, 3, 4, 50, 60]] * 2
    negative: dict[str, Any] = {"negative_original_size": (7, 8), "negative_target_size": (9, 10)}
    pictures(added, ImageRequest("ab", "c", width=24, height=16, seed=7, **sizes, **negative), engines)
    other = engines["unet"].calls[-1]["time_ids"].tolist()
    assert other == [[7, 8, 3, 4, 9, 10], [100, 200, 3, 4, 50, 60]]


@pytest.mark.parametrize("added", [True, False], indirect=True)
def test_no_negative_prompt_is_zeros_where_the_model_was_trained_so(added: DiffusionPipeline) -> None:
    assert added.config.added is not None
    zeros, engines = added.config.added.force_zeros_for_empty_prompt, added_fakes()
    pictures(added, ImageRequest("ab", seed=0), engines)
    assert {len(engines[name].calls[0]["input_ids"]) for name in ("text_encoder", "text_encoder_2")} == {
        1 if zeros else 2
    }
    call = engines["unet"].calls[0]
    for name in ("encoder_hidden_states", "text_embeds", "time_ids"):
        assert len(call[name]) == 2 and call[name][1].any(), name
        assert call[name][0].any() == (not zeros or name == "time_ids"), name


@pytest.mark.parametrize("negative", ["", "c"])
def test_added_conditions_without_guidance(added: DiffusionPipeline, negative: str) -> None:
    engines = added_fakes()
    pictures(added, ImageRequest("ab", negative, guidance_scale=1.0, seed=0), engines)
    assert {len(array) for array in engines["unet"].calls[0].values()} == {1}
    assert len(engines["text_encoder_2"].calls[0]["input_ids"]) == 1


def test_every_output_must_be_finite(added: DiffusionPipeline) -> None:
    engines = added_fakes()
    good = engines["text_encoder_2"].function
    engines["text_encoder_2"] = FakeEngine(
        lambda inputs: good(inputs) | {"text_embeds": np.full((1, 4), math.nan, np.float32)}
    )
    with pytest.raises(EngineError, match=r"^text_encoder_2 gave NaN or infinite values in 'text_embeds'"):
        pictures(added, ImageRequest("ab", seed=0), engines)


@pytest.mark.parametrize("field", CONDITIONS)
def test_a_model_without_added_conditions_takes_none(pipeline: DiffusionPipeline, field: str) -> None:
    sizes: dict[str, Any] = {field: 5.0 if field.endswith("score") else (8, 8)}
    with pytest.raises(InvalidInput, match="has no such condition: leave it out") as caught:
        pipeline(ImageRequest("ab", **sizes))
    assert caught.value.field == field


def test_an_empty_prompt_is_valid(pipeline: DiffusionPipeline) -> None:
    assert len(pictures(pipeline, ImageRequest("", seed=0))) == 1


def test_config_survives_the_manifest() -> None:
    config = DiffusionConfig.parse(CONFIG)
    assert config.dump() == CONFIG | {"sampler": "ddim"}
    assert DiffusionConfig.parse(json.loads(json.dumps(config.dump()))) == config
    assert config.sampler == "ddim"


def test_a_bundle_names_its_sampler_or_draws_as_before() -> None:
    scheduler = CONFIG["scheduler"] | {"_class_name": "PNDMScheduler"}
    older = {**CONFIG, "scheduler": scheduler}
    assert DiffusionConfig.parse(older).sampler == "dpmpp_2m"
    assert DiffusionConfig.parse({**older, "sampler": "pndm"}).sampler == "pndm"
    assert DiffusionConfig.parse({**older, "defaults": {"sampler": "euler"}}).sampler == "euler"


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("sizes", {"multiple": 3, "default": 15}, "scale_factor"),
        ("sizes", {"default": 17}, "sizes.default"),
        ("defaults", {"sampler": "eular"}, "eular"),
        ("defaults", {"steps": 0}, "steps"),
    ],
)
def test_damaged_settings_are_named(section: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=named):
        DiffusionConfig.parse(CONFIG | {section: CONFIG[section] | change})


# The same picture as diffusers


def tiny(tokenizer: Path) -> Any:
    """A random Stable Diffusion of a few thousand parameters, its pictures full of contrast."""
    torch = pytest.importorskip("torch")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=LIMIT, projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 1.5
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer), unet=unet,
        scheduler=diffusers.DDIMScheduler.from_config(CONFIG["scheduler"]),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def modules_as_engines(pipe: Any) -> dict[str, FakeEngine]:
    """The torch modules of a diffusers pipeline behind the engine contract."""
    import torch

    def engine(function: Any) -> FakeEngine:
        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            with torch.no_grad():
                return {
                    name: tensor.numpy()
                    for name, tensor in function({key: torch.from_numpy(x) for key, x in inputs.items()}).items()
                }

        return FakeEngine(run)

    return {
        "text_encoder": engine(lambda x: {"last_hidden_state": pipe.text_encoder(x["input_ids"])[0]}),
        "unet": engine(lambda x: {"noise_pred": pipe.unet(x["sample"], x["timestep"], x["encoder_hidden_states"])[0]}),
        "vae_decoder": engine(lambda x: {"image": pipe.vae.decode(x["latents"])[0]}),
    }


def diffusers_picture(pipe: Any, request: ImageRequest, patch: pytest.MonkeyPatch) -> Array:
    """The picture that diffusers draws from the same starting latents, its fresh noise taken from our stream."""
    import torch

    name = str(request.sampler)
    pipe.scheduler = reference(name, pipe.scheduler.config)
    assert request.latents is not None and request.seed is not None
    stream = random_stream(request.seed)
    stream.standard_normal(request.latents.shape, np.float32)  # the starting noise, which the request replaces
    feed(name, lambda: torch.from_numpy(stream.standard_normal(request.latents.shape, np.float32)), patch)
    pipe.set_progress_bar_config(disable=True)
    drawing = pipe(
        request.prompt, negative_prompt=request.negative_prompt, num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=request.width, height=request.height, latents=torch.from_numpy(request.latents), eta=request.eta,
        output_type="np",
    )  # fmt: skip
    return np.asarray((drawing.images[0] * 255).round(), np.uint8)


def psnr(a: Array, b: Array) -> float:
    """Peak signal to noise of uint8 pictures in dB; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def assert_same_picture(label: str, pipe: Any, ours: DiffusionPipeline, request: ImageRequest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        expected = diffusers_picture(pipe, request, patch)
    (ready,) = pictures(ours, request, modules_as_engines(pipe))
    figure = psnr(ready.image, expected)
    differ = int((ready.image != expected).sum())
    print(
        f"{label}, {request.sampler}: PSNR {figure:.1f} dB, {differ} of {expected.size} values differ, contrast "
        f"{expected.std():.0f}"
    )
    assert expected.std() > 10
    assert figure >= NEAREST_DB


@pytest.mark.parametrize("sampler", [*solvers(), "euler_karras", "dpmpp_2m_karras"])
def test_same_picture_as_diffusers(tokenizer: Path, pipeline: DiffusionPipeline, sampler: str) -> None:
    latents = random_stream(3).standard_normal((1, 4, 12, 8), np.float32)
    request = ImageRequest(
        "a red ab", "blue", 16, 24, steps=11, guidance_scale=4.0, sampler=sampler, seed=3, latents=latents
    )
    if sampler in WITH_ETA:
        request = replace(request, eta=0.6)
    assert_same_picture("tiny random model", tiny(tokenizer), pipeline, request)


@pytest.mark.skipif(not (SAMPLE / "model_index.json").is_file(), reason="the sample model is not in this tree")
@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=() if name in ("ddim", "euler", "dpmpp_2m_karras") else pytest.mark.full)
        for name in [*solvers(), "euler_karras", "dpmpp_2m_karras"]
    ],
)
def test_same_picture_as_diffusers_from_the_sample(sampler: str) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(SAMPLE, dtype=torch.float32)
    factor, edge = pipe.vae_scale_factor, pipe.unet.config.sample_size * pipe.vae_scale_factor
    config = DiffusionConfig.parse(
        {
            "scheduler": json.loads((SAMPLE / "scheduler" / "scheduler_config.json").read_text())
            | {"steps_offset": 1, "clip_sample": False},
            "vae": {
                "scaling_factor": pipe.vae.config.scaling_factor,
                "scale_factor": factor,
                "latent_channels": pipe.vae.config.latent_channels,
            },
            "sizes": {"min": edge, "max": edge, "default": edge, "multiple": factor},
        }
    )
    latents = random_stream(1).standard_normal(
        (1, config.vae.latent_channels, edge // factor, edge // factor), np.float32
    )
    prompt = "a large red circle at the top left on a white background"
    request = ImageRequest(
        prompt, "", edge, edge, steps=12, guidance_scale=3.0, sampler=sampler, seed=1, latents=latents
    )
    assert_same_picture("shapes-diffusion", pipe, DiffusionPipeline(config, SAMPLE / "tokenizer"), request)
