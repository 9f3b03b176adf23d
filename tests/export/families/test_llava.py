"""LLaVA of any decoder and tower answers like transformers' own LlavaForConditionalGeneration, token for token, or is
refused by name.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor

from export.architecture.generation import FILE, read_generation
from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.text import Message
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import load_model
from runtime.targets.openvino import compiling
from runtime.tasks.chat import ChatRequest
from tests.export.families.conftest import PICTURE, Make, answer, ask, library_answer

TARGETS = ("onnxruntime", "openvino")
WINDOW = 32
SEVERAL = ChatRequest(
    (
        Message("user", (PICTURE, "what is this? ", 255 - PICTURE)),
        Message("assistant", ("a circle",)),
        Message("user", ("and this? ", PICTURE[::-1].copy())),
    ),
    temperature=0.0,
)
"""Pictures before, between and behind texts, in two turns."""


def cast(source: Path, targets: tuple[str, ...] = TARGETS) -> Path:
    """An unquantized bundle, without the comparison of engines."""
    output = source.with_name("bundle")
    build(Options(str(source), output, targets=targets, quality="none"))
    return output


def compare(
    source: Path, bundle: Path, patch: pytest.MonkeyPatch, target: str, *lengths: int, count: int = 64, **settings: Any
) -> None:
    """Answers to questions of these lengths are those of the library."""
    with closing(load_model(bundle, target)) as model:
        for length in lengths:
            request = ask(length, temperature=0.0, max_tokens=count)
            wanted, _ = library_answer(
                source, model.pipeline, request, do_sample=False, max_new_tokens=count, **settings
            )
            assert answer(model, request, patch) == wanted, f"{target}, {length} tokens"


# Windows of attention


@pytest.fixture(scope="module")
def mistral(make: Make) -> tuple[Path, Path]:
    """A checkpoint whose attention is limited in every layer, and its bundle."""
    source = make(text={"model_type": "mistral", "sliding_window": WINDOW})
    return source, cast(source)


def test_answers_beyond_the_window(mistral: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for target in TARGETS:
        compare(*mistral, monkeypatch, target, 12, 55, 109)
    monkeypatch.setattr(compiling, "fits", lambda signature: False)  # caches in states, as on other processors
    compare(*mistral, monkeypatch, "openvino", 109)


def test_prompts_in_pieces_beyond_the_window(mistral: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, bundle = mistral
    for target in TARGETS:
        with closing(load_model(bundle, target)) as model:
            assert isinstance(model.pipeline, ChatPipeline)
            model.pipeline.config = model.pipeline.config.model_copy(update={"prefill_chunk": 24})
            request = ask(109, temperature=0.0, max_tokens=32)
            wanted, length = library_answer(source, model.pipeline, request, do_sample=False, max_new_tokens=32)
            assert length > 3 * WINDOW and answer(model, request, monkeypatch) == wanted, target


def test_a_window_in_some_layers_on_every_target(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run here is computed by what emulates it, with calls that leave the window: the build would fail
    otherwise.
    """
    source = make(
        text={"model_type": "qwen2", "sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}
    )
    others = ("coreml", "cuda", "directml")
    bundle, _ = build(Options(str(source), source.with_name("bundle"), targets=(*TARGETS, *others)))
    assert [state.window for state in bundle.submodel("decoder").signature.states] == [0, 0, 12, 12]
    found = {
        artifact.target: artifact.agreement for artifact in bundle.manifest.artifacts if artifact.submodel == "decoder"
    }
    assert found.keys() == {*TARGETS, *others} and all(
        agreement is not None and agreement.snr_db > 60 for agreement in found.values()
    )
    for target in TARGETS:
        compare(source, bundle.root, monkeypatch, target, 55)


# Language models that LLaVA is paired with

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "vicuna": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "bakllava": {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters":
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}},
    "phi": {"model_type": "phi", "head_dim": None, "num_key_value_heads": None, "partial_rotary_factor": 0.5,
        "hidden_act": "gelu_new"},
    "phi3": {"model_type": "phi3", "head_dim": None, "num_key_value_heads": 2, "sliding_window": 47},
    "padded": {"vocab_size": 576},
}  # fmt: skip
"""With the rotary types and the vocabulary of more rows than the tokenizer has tokens that checkpoints come with."""


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_every_language_model_answers_as_in_the_library(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """64 tokens, greedily and of 4 beams, about one picture and about several in two turns; shards of bfloat16."""
    source = make(text={key: value for key, value in MODELS[name].items() if value is not None})
    LlavaForConditionalGeneration.from_pretrained(source, dtype="bfloat16").save_pretrained(
        source, max_shard_size="200KB", save_original_format=False
    )
    (source / "model.safetensors").unlink()
    state = Build.open(Options(str(source), source.with_name("bundle"), targets=TARGETS, quality="none"))
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)
    build(state.options)
    wanted = dict[tuple[int, int], list[int]]()
    for target in TARGETS:
        with closing(load_model(source.with_name("bundle"), target)) as model:
            for case in product((0, 1), (1, 4)):
                request = replace((ask(40, temperature=0.0), SEVERAL)[case[0]], max_tokens=64, beams=case[1])
                if case not in wanted:
                    settings = {"do_sample": False, "max_new_tokens": 64, "num_beams": case[1]}
                    wanted[case], _ = library_answer(source, model.pipeline, request, **settings)
                assert answer(model, request, monkeypatch) == wanted[case], (target, case)


@pytest.mark.full
def test_files_of_older_processors_are_read_as_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIPFeatureExtractor, sizes as numbers, the template in the tokenizer's file, and no processor_config.json."""
    source = make()
    (source / "processor_config.json").unlink()
    file = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24, "resample": 3,
        "do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275,
        0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    (source / "preprocessor_config.json").write_text(json.dumps(file))
    tokenizer = json.loads((source / "tokenizer_config.json").read_bytes())
    tokenizer["chat_template"] = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    bundle, shown = cast(source), np.random.default_rng(1).integers(0, 255, (31, 50, 3), dtype=np.uint8)
    theirs = CLIPImageProcessorPil.from_pretrained(source)(Image.fromarray(shown), return_tensors="np")["pixel_values"]
    with closing(load_model(bundle, "openvino")) as model:
        assert isinstance(model.pipeline, ChatPipeline) and model.pipeline.vision is not None
        np.testing.assert_allclose(model.pipeline.vision.layout.tiles(shown, ""), theirs, atol=1e-5)
    compare(source, bundle, monkeypatch, "openvino", 12)


# Settings of generation


GENERATION: tuple[dict[str, Any] | None, ...] = (
    None,
    {"max_new_tokens": 24},
    {"eos_token_id": None, "max_new_tokens": 40},
    {"eos_token_id": [2, 9, 70, 81], "max_new_tokens": 40},
    {"eos_token_id": 2, "max_length": 70},
    {"eos_token_id": 2, "no_repeat_ngram_size": 2, "max_new_tokens": 40},
    {"eos_token_id": 2, "repetition_penalty": 1.3, "min_length": 60, "max_new_tokens": 40},
    {"eos_token_id": 2, "max_new_tokens": 20, "forced_eos_token_id": 2, "exponential_decay_length_penalty": [3, 1.6]},
    {"eos_token_id": 2, "num_beams": 3, "max_new_tokens": 24},
    {"eos_token_id": [2, 9, 70, 81], "num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "max_length": 60},
    {"eos_token_id": 2, "max_new_tokens": 20, "temperature": 0.0, "top_k": None, "top_p": 0.6, "do_sample": False},
)


@pytest.fixture(scope="module")
def plain(make: Make) -> tuple[Path, Path]:
    """A checkpoint with a Llama decoder, and its bundle."""
    source = make()
    return source, cast(source, ("onnxruntime",))


def test_generation_settings_mean_the_same(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of generate without arguments, which reads generation_config.json as well."""
    source, bundle = plain
    config = json.loads((source / "config.json").read_bytes())
    lengths = []
    with closing(load_model(bundle, "onnxruntime")) as model:
        pipeline = model.pipeline
        assert isinstance(pipeline, ChatPipeline)
        for settings in GENERATION:
            (source / FILE).unlink(missing_ok=True)
            if settings is not None:
                (source / FILE).write_text(json.dumps(settings))
            found = read_generation(source, config, pipeline.config.vocab_size)
            pipeline.config = pipeline.config.model_copy(
                update={"defaults": found.defaults, "eos_token_ids": found.ends}
            )
            longest = {} if settings is not None else {"max_new_tokens": found.defaults.max_tokens}
            request = ask(12)
            first, _ = library_answer(source, pipeline, request, **longest)
            assert answer(model, request, monkeypatch) == first, settings
            lengths.append(len(first))
            if settings is not None and "repetition_penalty" in settings:  # the words that it just used, forbidden
                words = {
                    "bad_words_ids": [[first[0]], first[1:3]],
                    "suppress_tokens": [first[3]],
                    "begin_suppress_tokens": [first[-1]],
                }
                (source / FILE).write_text(json.dumps(settings | words))
                found = read_generation(source, config, pipeline.config.vocab_size)
                pipeline.config = pipeline.config.model_copy(
                    update={"defaults": found.defaults, "eos_token_ids": found.ends}
                )
                wanted, _ = library_answer(source, pipeline, request)
                assert wanted != first and answer(model, request, monkeypatch) == wanted, settings | words
    assert len(set(lengths)) > 3


def test_settings_that_are_not_followed_are_notes(make: Make) -> None:
    source = resolve(str(make(generation={"eos_token_id": 2, "num_beam_groups": 4, "max_new_tokens": 8})))
    assert family_of(source).notes(source) == (
        "generation_config.json has num_beam_groups 4: beams are searched as one group",
    )


@pytest.mark.parametrize("settings", [{"top_k": -1}, {"guidance_scale": 2.0}, {"do_sample": True, "temperature": 0}])
def test_settings_are_refused_before_any_work(make: Make, settings: dict[str, Any]) -> None:
    source = make(generation=settings)
    reports: list[object] = []
    with pytest.raises((SourceError, UnsupportedModel), match=r"generation_config\.json"):
        build(Options(str(source), source.with_name("bundle"), targets=("onnxruntime",)), reports.append)
    assert not reports and not source.with_name("bundle").exists()


# Vision towers

SIGLIP = {"model_type": "siglip_vision_model"}
FULL = {"vision_feature_select_strategy": "full"}


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"vision": SIGLIP, "top": FULL, "processor": FULL | {"num_additional_image_tokens": 0}}, 9),
        ({"vision": SIGLIP | {"vision_use_head": False}, "processor": {"num_additional_image_tokens": 0}}, 8),
        ({"top": FULL | {"vision_feature_layer": [-2, 1, -1]}, "processor": FULL}, 10),
    ],
    ids=["siglip-full", "siglip-default", "clip-layers"],
)
def test_towers_see_what_the_library_sees(make: Make, settings: dict[str, Any], positions: int) -> None:
    """A picture has as many positions as transformers' processor makes, and parity compares their features."""
    source = make(**settings)
    state = Build.open(Options(str(source), source.with_name("bundle"), targets=("onnxruntime",)))
    config = state.family.config(state.source)
    processor = LlavaProcessor.from_pretrained(source)
    ids = processor(text="<image>", images=Image.fromarray(PICTURE), return_tensors="pt")["input_ids"][0].tolist()
    assert config["tokens_per_image"] == positions == ids.count(config["image_token_id"])
    assert not state.family.notes(state.source)
    assert _parity(state, next(part for part in state.parts if part.name == "vision_encoder")).error < 1e-5


def test_answers_behind_a_siglip_tower(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(vision=SIGLIP, top=FULL, processor=FULL | {"num_additional_image_tokens": 0})
    bundle = cast(source)
    for target in TARGETS:
        compare(source, bundle, monkeypatch, target, 12)


def edited(source: Path, folder: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """A copy of a checkpoint with other values in its config.json; those of "" are of the whole model."""
    copy = Path(shutil.copytree(source, folder))
    config = json.loads((copy / "config.json").read_bytes())
    for part, values in changes.items():
        (config[part] if part else config).update(values)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"vision_config": {"model_type": "pixtral"}},
            "vision_config.model_type) is a pixtral, expected one of clip_vision_model, siglip",
        ),
        ({"vision_config": {"model_type": "dinov2"}}, "is a dinov2"),
        ({"vision_config": {"model_type": "no_such_tower"}}, "no_such_tower"),
        ({"": {"vision_feature_layer": -4}}, "vision_feature_layer is -4, expected layers from -3 to 2"),
        ({"": {"vision_feature_layer": [1, 3]}}, "expected layers from -3 to 2"),
        ({"": {"vision_feature_layer": []}}, "expected layers from"),
        ({"": {"vision_feature_layer": "last"}}, "vision_feature_layer"),
        ({"": {"vision_feature_select_strategy": "cls"}}, "vision_feature_select_strategy"),
        (
            {"": {"projector_hidden_act": "swish2"}},
            "projector_hidden_act is 'swish2', which transformers does not have",
        ),
        ({"vision_config": {"hidden_act": "swish2"}}, "vision_config.hidden_act is 'swish2'"),
        ({"text_config": {"hidden_act": "swish2"}}, "text_config.hidden_act is 'swish2'"),
        ({"": {"_attn_implementation": "flash_attention"}}, "_attn_implementation is 'flash_attention', an attention"),
        (
            {"text_config": {"attn_implementation": "mla"}},
            "text_config.attn_implementation is 'mla', an attention that",
        ),
        ({"": {"image_token_index": 512}}, "image_token_index is 512, expected the id of a token below 512"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config.model_type) is a gemma2, expected one of"),
        ({"text_config": {"model_type": "mixtral"}}, "is a mixtral"),
        ({"text_config": {"model_type": "no_such_model"}}, "no_such_model"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    plain: tuple[Path, Path], tmp_path: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    source, reports = edited(plain[0], tmp_path / "source", changes), list[object]()
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        build(Options(str(source), tmp_path / "bundle", targets=("onnxruntime",)), reports.append)
    assert words in str(caught.value) and str(source / "config.json") in str(caught.value)
    assert not reports and "Download" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_kernels_that_a_config_names_are_the_library_s_matter(plain: tuple[Path, Path], tmp_path: Path) -> None:
    kernels = {"": {"_attn_implementation": "flash_attention_2"}, "text_config": {"attn_implementation": "eager"}}
    source = resolve(str(edited(plain[0], tmp_path / "source", kernels)))
    assert [part.name for part in family_of(source).parts(source, False)][-1] == "decoder"


def test_a_processor_that_counts_other_positions_is_a_note(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers fails on such a model; its prompts have as many positions here as the tower gives."""
    source = edited(plain[0], tmp_path / "source", {})
    file = source / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"num_additional_image_tokens": 0}))
    found = resolve(str(source))
    (note,) = family_of(found).notes(found)
    assert (
        note.startswith("processor_config.json counts 8 positions for a picture") and "the vision tower gives 9" in note
    )
