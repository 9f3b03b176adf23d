"""Tiny LLaVA checkpoints of any decoder and tower, saved by transformers, and what the library answers with them;
bundles with additions; checkpoints that are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import runtime.language.answering
import runtime.pipelines.chat
from export.build.build import build
from export.build.options import Options
from export.checkpoint.additions import Addition
from runtime.bundle.signature import Array
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.text import Message
from runtime.pipeline import drive
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-vlm"
EDGE, PATCH = 24, 8
TARGETS = ("onnxruntime", "openvino")
KINDS = ("tiny_diffusion", "tiny_xl")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
QUESTION = "what color is the circle? how many shapes are there? "
GRIDS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72], [96, 24], [24, 96]]
"""Heights and widths in pixels that a LLaVA-NeXT may resize a picture to: those of the published checkpoints and of the
paper, in tiles.
"""
PICTURE: Picture = np.random.default_rng(0).integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)
Fields = Mapping[str, Any]
Make = Callable[..., Path]


def save(folder: Path, text: Fields, vision: Fields, top: Fields, processor: Fields, generation: Fields | None) -> Path:
    """A LLaVA of two layers and random float16 weights, large enough that answers vary. Each mapping is laid over a
    config file.
    """
    config = json.loads((SAMPLE / "config.json").read_bytes())
    tokens = {key: config["text_config"][key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config["text_config"] = {
        "model_type": "llama", **tokens, **SMALL, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, **text,
    }  # fmt: skip
    config["vision_config"] = {
        "model_type": "clip_vision_model",
        **SMALL,
        "image_size": EDGE,
        "patch_size": PATCH,
        **vision,
    }
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(LlavaConfig.from_dict(config | dict(top)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.half().save_pretrained(folder, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(SAMPLE / name, folder)
    file = json.loads((SAMPLE / "processor_config.json").read_bytes())
    file["image_processor"] |= {"crop_size": {"height": EDGE, "width": EDGE}, "size": {"shortest_edge": EDGE}}
    (folder / "processor_config.json").write_text(json.dumps(file | {"patch_size": PATCH} | dict(processor)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def save_next(
    folder: Path,
    top: dict[str, Any] | None = None,
    grids: Sequence[Sequence[int]] = GRIDS,
    text: Fields | None = None,
) -> Path:
    """A LLaVA-NeXT of two layers and random float16 weights, large enough that answers vary."""
    config = json.loads((SAMPLE / "config.json").read_bytes())
    config.pop("model_type", None)
    tokens = {key: config["text_config"][key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config["text_config"] = {"model_type": "llama", **tokens, **SMALL, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, **(text or {})}  # fmt: skip
    config["vision_config"] = {"model_type": "clip_vision_model", **SMALL, "image_size": EDGE, "patch_size": PATCH}
    torch.manual_seed(0)
    model: Any = LlavaNextForConditionalGeneration(
        LlavaNextConfig.from_dict(config | {"image_grid_pinpoints": GRIDS} | (top or {}))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(SAMPLE / name, folder)
    file = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": EDGE},
        "crop_size": {"height": EDGE, "width": EDGE}, "do_pad": True, "image_grid_pinpoints": grids}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(file))
    return folder


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Saves a tiny LLaVA; `text`, `vision`, `top`, `processor` and `generation` are what its config files
    say besides.
    """

    def made(generation: Fields | None = None, **settings: Fields) -> Path:
        text, vision, top, processor = (settings.get(key, {}) for key in ("text", "vision", "top", "processor"))
        return save(tmp_path_factory.mktemp("sources") / "tiny", text, vision, top, processor, generation)

    return made


def ask(length: int, picture: bool = True, **settings: Any) -> ChatRequest:
    """A question of about `length` tokens, with a picture of nine more."""
    text = (QUESTION * (length // 12 + 1))[: length * 4]
    return ChatRequest((Message("user", (PICTURE, text) if picture else (text,)),), **settings)


def answer(model: LoadedModel, request: ChatRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that a loaded model answers with."""
    tokens: list[int] = []
    choose, search = runtime.language.answering.choose, runtime.pipelines.chat.search

    def listen(*args: Any, **keywords: Any) -> int:
        tokens.append(choose(*args, **keywords))
        return tokens[-1]

    def listen_to_beams(*args: Any) -> Any:
        found = yield from search(*args)
        tokens.extend(found[0])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(runtime.language.answering, "choose", listen)
        patch.setattr(runtime.pipelines.chat, "search", listen_to_beams)
        for _ in drive(model.pipeline(request), model.engines):  # type: ignore[arg-type]
            pass
    return tokens


@cache
def library(source: Path) -> Any:
    """The library's own model, in float32."""
    return LlavaForConditionalGeneration.from_pretrained(source, dtype="float32").eval()


def library_answer(source: Path, pipeline: Any, request: ChatRequest, **settings: Any) -> tuple[list[int], int]:
    """The tokens of transformers' own generate, and how many the prompt has."""
    assert isinstance(pipeline, ChatPipeline) and pipeline.vision is not None
    prompt = pipeline.prompt(request)
    model = library(source)
    file = source / "generation_config.json"
    model.generation_config = (
        GenerationConfig.from_pretrained(source) if file.is_file() else GenerationConfig.from_model_config(model.config)
    )
    pixels = (
        {
            "pixel_values": torch.from_numpy(
                np.concatenate([pipeline.vision.layout.tiles(one, "messages") for one in prompt.images])
            )
        }
        if prompt.images
        else {}
    )
    ids = torch.tensor([prompt.ids])
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, **settings)
    return found[0, len(prompt.ids) :].tolist(), len(prompt.ids)


# Stable Diffusion with what a build adds: a module that uses these has a fixture `additions`


@pytest.fixture(scope="module", params=[KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.full)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(kind: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(kind))


@pytest.fixture(scope="module")
def bundle(source: Path, additions: tuple[Addition, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / source.name
    build(Options(str(source), output, TARGETS, agreement="none", additions=additions))
    return output


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> Iterator[dict[str, LoadedModel]]:
    """The bundle by target, each loaded once."""
    models: dict[str, LoadedModel] = {}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture(params=TARGETS)
def ours(bundle: Path, loaded: dict[str, LoadedModel], request: pytest.FixtureRequest) -> LoadedModel:
    target = str(request.param)
    if target not in loaded:
        loaded[target] = load_model(bundle, target)
    return loaded[target]


def drawn(model: LoadedModel, request: ImageRequest) -> Array:
    (ready,) = (event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady))
    return ready.image


# What is refused


def refused(checkpoint: Path, folder: Path, changes: Mapping[str, Fields]) -> tuple[Path, str]:
    """The folder of a copy of a checkpoint whose config.json has these changes by part, and why it is not built."""
    source = Path(shutil.copytree(checkpoint, folder / "source"))
    config = json.loads((source / "config.json").read_bytes())
    for part, values in changes.items():
        config[part].update(values)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        build(Options(str(source), folder / "bundle", targets=("onnxruntime",)))
    return source, str(caught.value)
