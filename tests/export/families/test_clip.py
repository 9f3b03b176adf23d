"""CLIP embeds and scores like transformers' own CLIPModel."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
from typer.testing import CliRunner

import enginecast
from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from export.report.page import report
from export.report.quality import load_quality
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.placing.loading import load_model
from serving.cli.commands import app
from serving.dialects.grpc.server import Server
from serving.host.models import ModelHost
from tests.export.families.conftest import PICTURE, refused
from tests.export.families.embedding import WIDTH

TARGETS = ("onnxruntime", "openvino")
PICTURES = [PICTURE, PICTURE[::-1].copy(), 255 - PICTURE]
TEXTS = ["a red circle", "a blue square at the top left", "a red square", "x", ""]


@pytest.fixture(scope="module")
def bundle(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("clip") / "bundle"
    build(Options(str(tiny_clip), output, targets=TARGETS, quality="none"))
    return output


def library(source: Path) -> Any:
    """The outputs of the library's own forward for all pictures and texts."""
    tokens = AutoTokenizer.from_pretrained(source)(TEXTS, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(source)(PICTURES, return_tensors="pt")
    with torch.inference_mode():
        return CLIPModel.from_pretrained(source, dtype="float32").eval()(**tokens, **pixels)


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings_and_scores_are_the_library_s(tiny_clip: Path, bundle: Path, target: str) -> None:
    wanted = library(tiny_clip)
    with enginecast.load(bundle, target=target) as model:
        found, matched = model.embed(TEXTS, PICTURES), model.match(PICTURES, TEXTS)
        with pytest.raises(InvalidInput, match="match: is 'itm', which needs a network that this model does not have"):
            model.match(PICTURES, TEXTS, "itm")
    assert found.texts.shape == (len(TEXTS), WIDTH) and found.images.shape == (len(PICTURES), WIDTH)
    np.testing.assert_allclose(found.texts, wanted.text_embeds, atol=1e-5)
    np.testing.assert_allclose(found.images, wanted.image_embeds, atol=1e-5)
    np.testing.assert_allclose(matched.scores, wanted.logits_per_image, atol=1e-4)
    assert np.ptp(matched.scores) > 1


def test_a_server_and_the_command_give_the_same(bundle: Path, tmp_path: Path) -> None:
    with enginecast.load(bundle, target="onnxruntime") as model:
        found, matched = model.embed(TEXTS, PICTURES), model.match(PICTURES, TEXTS)

    def use(address: str) -> tuple[Any, Any]:
        with enginecast.Client(address, "tiny-clip") as client:
            with pytest.raises(InvalidInput, match="match: is 'itm', which needs a network"):
                client.match(PICTURES, TEXTS, "itm")
            return client.embed(TEXTS, PICTURES), client.match(PICTURES, TEXTS)

    async def served() -> tuple[Any, Any]:
        host = ModelHost([Bundle(bundle)], lambda opened, target: load_model(opened, "onnxruntime"))
        server = Server(host, "127.0.0.1:0")
        await server.start()
        await host.load("tiny-clip")
        results = await asyncio.to_thread(use, f"127.0.0.1:{server.port}")
        await server.stop(0)
        return results

    vectors, scores = asyncio.run(served())
    np.testing.assert_array_equal(vectors.texts, found.texts)
    np.testing.assert_array_equal(vectors.images, found.images)
    np.testing.assert_array_equal(scores.scores, matched.scores)

    Image.fromarray(PICTURE).save(tmp_path / "p.png")
    given = ["embed", "--bundle", str(bundle), "--target", "onnxruntime", "--image", str(tmp_path / "p.png")]
    given += ["--text", TEXTS[0]]
    (text, image) = map(json.loads, CliRunner().invoke(app, given).stdout.splitlines())
    np.testing.assert_allclose(text["embedding"], found.texts[0], rtol=1e-5)
    np.testing.assert_allclose(image["embedding"], found.images[0], rtol=1e-5)
    score, path, words = CliRunner().invoke(app, [*given, "--match", "itc"]).stdout.strip().split("\t")
    assert (path, words) == (str(tmp_path / "p.png"), TEXTS[0])
    assert abs(float(score) - matched.scores[0, 0]) < 1e-3


def test_every_submodel_computes_what_the_library_computes(tiny_clip: Path, tmp_path: Path) -> None:
    state = Build.open(Options(str(tiny_clip), tmp_path / "other", targets=("onnxruntime",)))
    assert [part.name for part in state.parts] == ["vision_encoder", "text_encoder"]
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)


@pytest.mark.full
def test_a_quantized_bundle_is_compared_with_the_float_model(tiny_clip: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(tiny_clip), tmp_path / "bundle", quant="int8", allow_low_quality=True))
    assert all(0.5 < one.image_cosine <= 1.0001 for one in load_quality(bundle).results["embeddings"])
    report(bundle, tmp_path / "report.html")
    assert "<h2>Embeddings</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"hidden_act": "swish2"}}, "text_config.hidden_act is 'swish2'"),
        ({"vision_config": {"hidden_act": "quick_gelus"}}, "did you mean 'quick_gelu'?"),
        ({"text_config": {"eos_token_id": 600}}, "does not end texts in token 600, at which the model reads them"),
        ({"vision_config": {"num_attention_heads": 5}}, "is no config that transformers can read"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1, expected 3"),
        ({"vision_config": {"image_size": 32}}, "position_embedding.weight (expected [17, 64], found [10, 64])"),
        ({"text_config": {"vocab_size": 100}}, "token_embedding.weight (expected [100, 64], found [603, 64])"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tiny_clip: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    source, message = refused(tiny_clip, tmp_path, changes)
    assert words in message and str(source) in message
