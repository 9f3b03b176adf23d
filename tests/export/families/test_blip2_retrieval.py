"""BLIP-2 embeds and matches like transformers' own Blip2ForImageTextRetrieval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, BlipImageProcessor

import enginecast
from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from runtime.errors import InvalidInput, UnsupportedModel
from tests.export.families.blip import QUERIES
from tests.export.families.embedding import WIDTH, save_retrieval
from tests.export.families.test_clip import PICTURES, TEXTS

TARGETS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def bundle(tiny_blip2_retrieval: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("retrieval") / "bundle"
    build(Options(str(tiny_blip2_retrieval), output, targets=TARGETS, quality="none"))
    return output


def library(source: Path, matching: bool, texts: list[str]) -> Any:
    """The outputs of the library's own forward for all pictures and these texts."""
    tokens = AutoTokenizer.from_pretrained(source)(texts, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    pixels = BlipImageProcessor.from_pretrained(source)(PICTURES, return_tensors="pt")
    with torch.inference_mode():
        model = Blip2ForImageTextRetrieval.from_pretrained(source, dtype="float32").eval()
        return model(**tokens, **pixels, use_image_text_matching_head=matching)


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings_and_scores_are_the_library_s(tiny_blip2_retrieval: Path, bundle: Path, target: str) -> None:
    wanted = library(tiny_blip2_retrieval, False, TEXTS)
    # The library matches a picture with one text.
    pairs = [library(tiny_blip2_retrieval, True, [text] * len(PICTURES)).logits_per_image for text in TEXTS]
    probabilities = torch.stack(pairs, dim=1).softmax(dim=-1)[..., 1]
    with enginecast.load(bundle, target=target) as model:
        found = model.embed(TEXTS, PICTURES)
        contrast, matched = model.match(PICTURES, TEXTS), model.match(PICTURES, TEXTS, "itm")
    assert found.images.shape == (len(PICTURES), QUERIES, WIDTH)
    np.testing.assert_allclose(found.texts, wanted.text_embeds, atol=1e-5)
    np.testing.assert_allclose(found.images, wanted.image_embeds, atol=1e-5)
    np.testing.assert_allclose(contrast.scores, wanted.logits_per_image, atol=1e-5)
    np.testing.assert_allclose(matched.scores, probabilities, atol=1e-4)
    assert np.ptp(matched.scores) > 0.01


@pytest.mark.parametrize("image_token", [None, 5])
def test_every_submodel_computes_what_the_library_computes(tmp_path: Path, image_token: int | None) -> None:
    """Newer checkpoints name the placeholder that the library's processor puts before texts."""
    source = save_retrieval(tmp_path / "source", image_token)
    state = Build.open(Options(str(source), tmp_path / "other", targets=("onnxruntime",)))
    assert [part.name for part in state.parts] == ["vision_encoder", "qformer", "text_encoder", "matcher"]
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)


def test_a_q_former_that_reads_no_texts_is_refused(tiny_blip2_retrieval: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_blip2_retrieval, tmp_path / "source"))
    config = json.loads((source / "config.json").read_bytes())
    config["qformer_config"]["use_qformer_text_input"] = False
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="use_qformer_text_input is false, expected true"):
        build(Options(str(source), tmp_path / "bundle", targets=("onnxruntime",)))


def test_texts_are_refused_by_number(bundle: Path) -> None:
    with enginecast.load(bundle, target="onnxruntime") as model:
        with pytest.raises(InvalidInput, match=r"texts\[1\]: has 102 tokens, the model reads 96: shorten it"):
            model.embed(["a", "a " * 100])
        with pytest.raises(InvalidInput, match=r"texts\[0\]: contains \[SEP\], a special token"):
            model.match(PICTURES, ["a [SEP]"])
