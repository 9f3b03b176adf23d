"""LLaVA-NeXT answers like transformers' own LlavaNextForConditionalGeneration, token for token, whatever the pictures'
sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil

from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.errors import EnginecastError, SourceError, UnsupportedModel
from runtime.language.text import Message
from runtime.language.vision import Prompt
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest
from runtime.vision.images import Picture
from tests.export.families.conftest import GRIDS, QUESTION, answer, save_next

TARGETS = ("onnxruntime", "openvino")
SIZES = ((24, 24), (48, 48), (20, 70), (90, 31), (5, 4), (33, 50))
"""Heights and widths in pixels."""
EXTREMES = (*((height, width) for height, width in GRIDS), (96, 20), (20, 96), (24, 90), (200, 30), (1, 9))
"""Those of every grid, and tall and wide ones that leave much of theirs empty."""
TEXTS: dict[str, dict[str, Any]] = {
    "vicuna": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "mistral": {"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None},
    "yi": {"num_key_value_heads": 1, "rope_theta": 5e6, "vocab_size": 576},
}
"""Language models of published checkpoints: with keys for each head, with 32K positions, with few keys and a padded
vocabulary.
"""


ANSWERS: dict[tuple[Any, ...], list[int]] = {}
"""Of the library, each computed once."""


def library_answer(source: Path, prompt: Prompt, count: int, beams: int) -> list[int]:
    """The tokens of transformers' generate, its own image processor included."""
    key = source, count, beams, *prompt.keys
    if key not in ANSWERS:
        images = LlavaNextImageProcessorPil.from_pretrained(source)(
            [Image.fromarray(one) for one in prompt.images], return_tensors="pt"
        )
        ids = torch.tensor([prompt.ids])
        with torch.inference_mode():
            found = library(source).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **images, do_sample=False, max_new_tokens=count,
                num_beams=beams,
            )  # fmt: skip
        ANSWERS[key] = list(map(int, found[0, len(prompt.ids) :]))
    return ANSWERS[key]


def compare(
    source: Path, model: LoadedModel, shown: Sequence[Picture], patch: pytest.MonkeyPatch, beams: int = 1
) -> int:
    """The answer about these pictures is that of the library; how many positions the pictures have."""
    assert isinstance(model.pipeline, ChatPipeline)
    request = ChatRequest((Message("user", (*shown, QUESTION)),), temperature=0.0, max_tokens=64, beams=beams)
    prompt = model.pipeline.prompt(request)
    wanted = library_answer(source, prompt, 64, beams)
    assert answer(model, request, patch) == wanted, (model.target, [one.shape for one in shown], beams)
    return prompt.seen


@cache
def library(source: Path) -> Any:
    return LlavaNextForConditionalGeneration.from_pretrained(source, dtype="float32").eval()


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_answers_about_pictures_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture alone, and several of different sizes in one question."""
    source, bundle = save_next(tmp_path / "tiny"), tmp_path / "bundle"
    build(Options(str(source), bundle, targets=TARGETS, quality="none"))
    shown = pictures(SIZES)
    for target, some in zip(TARGETS, (shown, shown[3:5]), strict=True):
        with closing(load_model(bundle, target)) as model:
            alone = {compare(source, model, [one], monkeypatch) for one in some}
            assert len(alone) >= min(len(some), 4) and compare(source, model, shown[2:5], monkeypatch) > max(alone)


@pytest.mark.full
@pytest.mark.parametrize("text", TEXTS)
def test_answers_of_every_published_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """About pictures of every grid, and tall and wide ones; each submodel is the library's."""
    source, bundle = save_next(tmp_path / "tiny", text=TEXTS[text]), tmp_path / "bundle"
    state = Build.open(Options(str(source), bundle, targets=TARGETS, quality="none"))
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)
    build(state.options)
    shown = pictures(EXTREMES)
    for target in TARGETS:
        with closing(load_model(bundle, target)) as model:
            assert len({compare(source, model, [one], monkeypatch) for one in shown}) > 4
            for beams in (1, 4):
                compare(source, model, shown[3:6], monkeypatch, beams)


@pytest.mark.parametrize(
    ("top", "grids", "kind", "reason"),
    [
        ({"vision_feature_select_strategy": "full"}, GRIDS, UnsupportedModel, "10 features of a tile"),
        ({"image_grid_pinpoints": [[24, 50]]}, [[24, 50]], SourceError, "multiples of"),
        ({}, GRIDS[:2], SourceError, "image processor's file"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    tmp_path: Path, top: dict[str, Any], grids: list[list[int]], kind: type[EnginecastError], reason: str
) -> None:
    source = resolve(str(save_next(tmp_path / "tiny", top, grids)))
    with pytest.raises(kind, match=reason):
        family_of(source).config(source)
