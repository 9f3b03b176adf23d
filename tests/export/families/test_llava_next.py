"""LLaVA-NeXT answers like transformers' own LlavaNextForConditionalGeneration, token for token, whatever the pictures'
sizes.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil

from export.build.build import build
from export.build.options import Options
from export.checkpoint.source import resolve
from export.family import family_of
from runtime.errors import EnginecastError, SourceError, UnsupportedModel
from runtime.language.text import Message
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import load_model
from runtime.tasks.chat import ChatRequest
from tests.export.families.conftest import GRIDS, QUESTION, answer, save_next

SIZES = ((24, 24), (48, 48), (20, 70), (90, 31), (5, 4), (33, 50))
"""Heights and widths in pixels."""


def library_answer(source: Path, model: Any, prompt: Any, count: int) -> list[int]:
    """The tokens of transformers' generate, its own image processor included."""
    images = LlavaNextImageProcessorPil.from_pretrained(source)(
        [Image.fromarray(one) for one in prompt.images], return_tensors="pt"
    )
    ids = torch.tensor([prompt.ids])
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **images, do_sample=False, max_new_tokens=count
        )
    return list(map(int, found[0, len(prompt.ids) :]))


def test_answers_about_pictures_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture alone, and several of different sizes in one question."""
    source = save_next(tmp_path / "tiny")
    build(Options(str(source), tmp_path / "bundle", targets=("onnxruntime",), quality="none"))
    rng, lengths = np.random.default_rng(0), set()
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    theirs: Any = LlavaNextForConditionalGeneration.from_pretrained(source, dtype="float32").eval()
    with closing(load_model(tmp_path / "bundle", "onnxruntime")) as model:
        assert isinstance(model.pipeline, ChatPipeline)
        for shown in (*((one,) for one in pictures), tuple(pictures[2:5])):
            request = ChatRequest((Message("user", (*shown, QUESTION)),), temperature=0.0, max_tokens=64)
            prompt = model.pipeline.prompt(request)
            assert answer(model, request, monkeypatch) == library_answer(source, theirs, prompt, 64)
            lengths.add(prompt.seen)
    assert len(lengths) > 4


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
