"""Texts of one length run together, pictures in calls of a limited size, and every mistake is named before any call."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from runtime.bundle.signature import Array
from runtime.engine import FakeEngine
from runtime.errors import BundleError, EngineError, InvalidInput
from runtime.pipeline import drive
from runtime.pipelines.embed import EmbedPipeline
from runtime.tasks.embed import Embeddings, EmbedRequest, Scores
from runtime.vision.images import PictureFile, decode_image

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-diffusion"
CONFIG: dict[str, Any] = {"width": 2, "text_length": 9, "vocab_size": 603, "matcher": True}
PICTURE = np.full((12, 18, 3), 255, np.uint8)
OUTPUTS = "text_embeds", "match_logits"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE / "tokenizer", tmp_path / "tokenizer")
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size).save_pretrained(tmp_path / "preprocessor")
    return tmp_path


@pytest.fixture
def pipeline(root: Path) -> EmbedPipeline:
    return EmbedPipeline.open(root, CONFIG)


def engines() -> dict[str, FakeEngine]:
    """A text is its length and 1, a picture the mean of its pixels and -1, and they match by the sum of all tokens."""

    def read(inputs: Mapping[str, Array]) -> dict[str, Array]:
        ids = inputs["input_ids"]
        return {"text_embeds": np.stack([np.full(len(ids), ids.shape[1]), np.ones(len(ids))], -1).astype(np.float32)}

    def see(inputs: Mapping[str, Array]) -> dict[str, Array]:
        means = inputs["pixel_values"].mean(axis=(1, 2, 3))
        features = np.stack([means, -np.ones_like(means)], -1)
        return {"image_features": features, "image_embeds": features[:, None]}

    def match(inputs: Mapping[str, Array]) -> dict[str, Array]:
        score = inputs["image_embeds"][:, 0, 0] * 0 + inputs["input_ids"].sum(axis=1) / 1000
        return {"match_logits": np.stack([np.zeros_like(score), score], -1)}

    return {"text_encoder": FakeEngine(read), "vision_encoder": FakeEngine(see), "matcher": FakeEngine(match)}


def test_texts_of_one_length_run_together(pipeline: EmbedPipeline) -> None:
    fakes, texts = engines(), ("red", "a red circle", "blue", "x", "a blue circle")
    pictures = (PICTURE,) * 19
    (found,) = drive(pipeline(EmbedRequest(texts, pictures)), fakes)
    assert isinstance(found, Embeddings) and found.images.shape == (19, 2)
    lengths = [len(pipeline.text.tokenizer.encode(text).ids) for text in texts]
    assert found.texts[:, 0].tolist() == lengths and len(set(lengths)) > 1
    assert found.prompt_tokens == sum(lengths)
    assert len(fakes["text_encoder"].calls) == len(set(lengths))
    assert [len(call["pixel_values"]) for call in fakes["vision_encoder"].calls] == [16, 3]
    (found,) = drive(pipeline(EmbedRequest(texts)), fakes)
    assert isinstance(found, Embeddings) and found.images.shape == (0, 2)


def test_every_picture_is_compared_with_every_text(pipeline: EmbedPipeline) -> None:
    texts, pictures = ("red", "a red circle", "blue"), (PICTURE, PICTURE // 2)
    (vectors,) = drive(pipeline(EmbedRequest(texts, pictures)), engines())
    (contrast,) = drive(pipeline(EmbedRequest(texts, pictures, "itc")), engines())
    assert isinstance(vectors, Embeddings) and isinstance(contrast, Scores)
    np.testing.assert_allclose(contrast.scores, vectors.images @ vectors.texts.T, rtol=1e-6)
    (matched,) = drive(pipeline(EmbedRequest(texts, pictures, "itm")), engines())
    assert isinstance(matched, Scores)
    sums = np.array([sum(pipeline.text.tokenizer.encode(text).ids) for text in texts]) / 1000
    np.testing.assert_allclose(matched.scores, np.tile(1 / (1 + np.exp(-sums)), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("texts", "images", "match", "message"),
    [
        ((), (), None, "texts: is empty, and so is images"),
        (("a",), (), "itc", "images: is empty: to match"),
        ((), (PICTURE,), "itm", "texts: is empty: to match"),
        (("a",), (PICTURE,), "both", "match: is 'both', expected one of itc, itm"),
        (("a",) * 1001, (), None, "texts: has 1,001 texts"),
        (("a" * 100_001,), (), None, "texts: has 100,001 characters"),
        (("a",) * 1000, (PICTURE,) * 2, "itm", "match: has 2,000 pairs of a picture and a text"),
        ((), (PICTURE,) * 33, None, "images: has 33 pictures"),
        (("a", "\ud800"), (), None, "texts[1]: holds half a surrogate pair"),
        ((), (PICTURE, PICTURE[:, :, :2]), None, "images[1]: has dtype uint8 and shape [12, 18, 2]"),
        (("a", "a red circle " * 9), (), None, "texts[1]: has"),
        (("<|endoftext|>",), (), None, "texts[0]: contains <|endoftext|>, a special token"),
        ((), (np.zeros((1, 20_000_000, 3), np.uint8),), None, "images[0]: is 20000000x1, which would be resized"),
    ],
)
def test_mistakes_are_named_before_any_call(
    pipeline: EmbedPipeline, texts: Any, images: Any, match: Any, message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        pipeline(EmbedRequest(texts, images, match))
    assert str(caught.value).startswith(message)


def test_files_that_do_not_fit_are_refused(root: Path) -> None:
    with pytest.raises(BundleError, match=r"the embedding settings cannot be read(.|\n)*width"):
        EmbedPipeline.open(root, {**CONFIG, "width": 0})
    with pytest.raises(BundleError, match="embeddings for ids below 100"):
        EmbedPipeline.open(root, {**CONFIG, "vocab_size": 100})
    with pytest.raises(BundleError, match=r"model.safetensors cannot be read"):
        EmbedPipeline.open(root, {**CONFIG, "scaled": True})
    file = root / "preprocessor" / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "ConvNextImageProcessor"}))
    with pytest.raises(BundleError, match="the class ConvNextImageProcessor is not supported"):
        EmbedPipeline.open(root, CONFIG)


def files() -> dict[str, bytes]:
    """Picture files that are not plain: what each of them shows is in docs/compatibility.md."""
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 256, (12, 18, 3), np.uint8)) for _ in range(2))
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(rng.integers(0, 65536, (12, 18), np.uint16))
    made = {
        "animated": (first, "GIF", {"save_all": True, "append_images": [second]}),
        "cmyk": (first.convert("CMYK"), "TIFF", {}),
        "16-bit": (grey, "PNG", {}),
        "turned": (first, "JPEG", {"exif": turned}),
        "alpha": (Image.merge("RGBA", (*first.split(), second.split()[0])), "PNG", {}),
    }
    found = {}
    for name, (image, kind, options) in made.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        found[name] = file.getvalue()
    return found


def test_files_of_every_kind_are_seen_as_documented(pipeline: EmbedPipeline) -> None:
    """The encoder gets the pixels that `decode_image` gives, which is compared with transformers elsewhere."""
    fakes = engines()
    data = files()
    shown = tuple(PictureFile.open(one, name) for name, one in data.items())
    list(drive(pipeline(EmbedRequest(images=shown)), fakes))
    list(drive(pipeline(EmbedRequest(images=tuple(decode_image(one) for one in data.values()))), fakes))
    one, other = (call["pixel_values"] for call in fakes["vision_encoder"].calls)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one[0], one[1])  # the first frame is what the CMYK file shows
    assert shown[3].size == (12, 18) and len({picture.tobytes() for picture in one}) == len(data) - 1


def test_texts_are_filled_up_where_the_model_reads_all_of_them(root: Path) -> None:
    fakes, padded = engines(), EmbedPipeline.open(root, CONFIG | {"padding": 7})
    list(drive(padded(EmbedRequest(("red", "a red circle"))), fakes))
    (call,) = fakes["text_encoder"].calls
    ids = padded.text.tokenizer.encode("red").ids
    assert call["input_ids"][0].tolist() == ids + [7] * (9 - len(ids)) and call["input_ids"].shape == (2, 9)


@pytest.mark.parametrize("match", [None, "itc", "itm"])
def test_results_that_are_no_numbers_are_an_engine_error(pipeline: EmbedPipeline, match: Any) -> None:
    fakes = engines()
    for fake in ("text_encoder", "matcher"):
        fakes[fake] = FakeEngine(lambda _: {name: np.full((1, 2), np.nan, np.float32) for name in OUTPUTS})
    with pytest.raises(EngineError, match="not numbers: verify the bundle"):
        list(drive(pipeline(EmbedRequest(("red",), (PICTURE,), match)), fakes))
