"""SigLIP embeds and scores like transformers' own SiglipModel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SiglipImageProcessor, SiglipModel

import enginecast
from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.source import resolve
from export.checkpoint.tokenizer import tokenizer_file
from export.family import family_of
from runtime.errors import InvalidInput, SourceError
from tests.export.families.conftest import PICTURE, refused

TARGETS = ("onnxruntime", "openvino")
PICTURES = [PICTURE, PICTURE[::-1].copy(), 255 - PICTURE]
TEXTS = ["a red circle", "A blue Square, on the left!", "x", ""]


@pytest.fixture(scope="module")
def bundle(tiny_siglip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("siglip") / "bundle"
    build(Options(str(tiny_siglip), output, targets=TARGETS, quality="none"))
    return output


def library(source: Path) -> Any:
    """The outputs of the library's own forward for all pictures and texts."""
    tokens = AutoTokenizer.from_pretrained(source)(TEXTS, padding="max_length", max_length=112, return_tensors="pt")
    pixels = SiglipImageProcessor.from_pretrained(source)(PICTURES, return_tensors="pt")
    model: Any = SiglipModel.from_pretrained(source, dtype="float32").eval()
    with torch.inference_mode():
        return model(input_ids=tokens["input_ids"], **pixels)


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings_and_scores_are_the_library_s(tiny_siglip: Path, bundle: Path, target: str) -> None:
    wanted = library(tiny_siglip)
    with enginecast.load(bundle, target=target) as model:
        found, matched = model.embed(TEXTS, PICTURES), model.match(PICTURES, TEXTS)
        with pytest.raises(InvalidInput, match=r"texts\[0\]: has \d+ tokens, the model reads 112: shorten it"):
            model.embed(["q j k v " * 30])
    np.testing.assert_allclose(found.texts, wanted.text_embeds, atol=1e-5)
    np.testing.assert_allclose(found.images, wanted.image_embeds, atol=1e-5)
    np.testing.assert_allclose(matched.scores, wanted.logits_per_image, atol=1e-4)
    assert np.ptp(matched.scores) > 0.5


def test_every_submodel_computes_what_the_library_computes(tiny_siglip: Path, tmp_path: Path) -> None:
    state = Build.open(Options(str(tiny_siglip), tmp_path / "other", targets=("onnxruntime",)))
    assert [part.name for part in state.parts] == ["vision_encoder", "text_encoder"]
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)


def test_a_tokenizer_file_of_another_model_is_refused(tiny_siglip: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_siglip, tmp_path / "source"))
    file = json.loads((source / "tokenizer.json").read_bytes())
    (source / "tokenizer.json").write_text(json.dumps(file | {"normalizer": None}))
    with pytest.raises(SourceError, match=r"tokenizer.json reads 'A  Red Fox.*' as other tokens than the Siglip"):
        tokenizer_file(source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"none of tokenizer\.json"):
        tokenizer_file(source)


@pytest.mark.parametrize("change", [{"padding_side": "left"}, {"pad_token": None}])
def test_texts_are_filled_up_behind(tiny_siglip: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    source = Path(shutil.copytree(tiny_siglip, tmp_path / "source"))
    file = json.loads((source / "tokenizer_config.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps(file | change))
    found = resolve(str(source))
    with pytest.raises(SourceError, match=r"expected a token that follows texts \('right'\)"):
        family_of(found).config(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"hidden_act": "swish2"}}, "text_config.hidden_act is 'swish2'"),
        ({"vision_config": {"vision_use_head": False}}, "vision_config.vision_use_head is false"),
        ({"text_config": {"projection_size": 32}}, "text_config.projection_size is 32, expected 64"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1, expected 3"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tiny_siglip: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    source, message = refused(tiny_siglip, tmp_path, changes)
    assert words in message and str(source) in message
