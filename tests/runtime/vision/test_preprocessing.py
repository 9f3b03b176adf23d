"""Preprocessing equals transformers', whatever of its image processor files says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from runtime.errors import BundleError, InvalidInput
from runtime.vision.images import PictureFile, encode_image
from runtime.vision.preprocessing import CLASSES, ImagePreprocessor

RNG = np.random.default_rng(0)
LIBRARY: dict[str, Any] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BlipImageProcessor": BlipImageProcessorPil,
}
NESTED, OWN = "processor_config.json", "preprocessor_config.json"


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def published(folder: Path, content: object, name: str = OWN) -> Path:
    """A LLaVA folder with an image processor file."""
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / name).write_text(json.dumps(content))
    return folder


def theirs(folder: Path, image: Image.Image) -> Any:
    return np.asarray(
        AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="np")["pixel_values"],
        np.float32,
    )


@pytest.mark.parametrize("kind", CLASSES)
@settings(max_examples=30)
@given(data=st.data())
def test_preprocessing_equals_transformers(kind: str, data: st.DataObject) -> None:
    length = st.integers(1, 40)
    config: dict[str, Any] = {
        "image_processor_type": kind,
        "size": data.draw(
            st.one_of(
                st.builds(lambda n: {"shortest_edge": n}, length),
                st.builds(lambda h, w: {"height": h, "width": w}, length, length),
            )
        ),
        "crop_size": {"height": data.draw(length), "width": data.draw(length)},
        "resample": data.draw(st.sampled_from([0, 1, 2, 3, 4, 5])),
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
        "rescale_factor": data.draw(st.sampled_from([1 / 255, 0.01])),
    }
    config |= {
        f"do_{step}": data.draw(st.sampled_from([True, False, None]))
        for step in ("resize", "rescale", "normalize", "center_crop", "pad")
    }
    if "height" not in config["size"] or not config["do_resize"]:
        config["do_center_crop"] = True
    image = np.asarray(noise(data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))))
    expected = np.asarray(
        LIBRARY[kind](**config)(Image.fromarray(image), return_tensors="np")["pixel_values"], np.float32
    )
    preprocessor = ImagePreprocessor.model_validate(config)
    actual = preprocessor([image])
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual.dtype == np.float32
    assert actual.shape[2:] == (preprocessor.output_size.height, preprocessor.output_size.width)
    np.testing.assert_array_equal(preprocessor([PictureFile.open(encode_image(image), "image")]), actual)


FILES: dict[str, dict[str, Any]] = {
    "nothing but the class": {},
    "a number as size": {"size": 32, "crop_size": 32, "do_center_crop": True},
    "two numbers as size": {"size": [32, 24], "crop_size": [24, 20], "do_center_crop": True},
    "height and width": {"size": {"height": 30, "width": 20}},
    "no resize": {"do_resize": None, "do_center_crop": True, "crop_size": 24},
    "no crop": {"do_center_crop": None, "size": {"height": 30, "width": 20}},
    "no normalize": {"do_normalize": None, "image_mean": None, "image_std": None},
    "no rescale": {"do_rescale": None, "rescale_factor": None},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "no rgb": {"do_convert_rgb": None},
    "other keys": {"processor_class": "LlavaProcessor", "vision_feature_layer": -2, "data_format": "channels_first"},
    "padding": {"do_pad": True, "image_mean": [0.5, 0.25, 0.75], "size": {"height": 24, "width": 24}},
    "padding to a shortest edge": {
        "do_pad": True,
        "size": {"shortest_edge": 24},
        "crop_size": 24,
        "do_center_crop": True,
    },
    "no image_mean": {"image_mean": None},
    "no size": {"size": None},
    "no crop size": {"do_center_crop": True, "crop_size": None},
    "four means": {"image_mean": [0.5] * 4},
    "no edge": {"size": {"shortest_edge": 0}},
    "a text as size": {"size": "224"},
    "another size": {"size": {"longest_edge": 224}},
    "both sizes": {"size": {"height": 30, "width": 20, "shortest_edge": 10}},
}


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("kind", CLASSES)
def test_files_mean_what_transformers_reads_in_them(tmp_path: Path, kind: str, suffix: str) -> None:
    """What it cannot use is refused, naming the file."""
    image = noise(50, 71)
    for name, content in FILES.items():
        folder = published(tmp_path, content | {"image_processor_type": kind + suffix})
        try:
            expected = theirs(folder, image)
        except Exception:
            with pytest.raises(BundleError, match=r"preprocessor_config\.json cannot be used: \w"):
                ImagePreprocessor.from_folder(folder)
        else:
            np.testing.assert_allclose(
                ImagePreprocessor.from_folder(folder)([np.asarray(image)]), expected, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize(
    "content", [{}, {"do_pad": True}, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 24}]
)
def test_files_without_a_class(tmp_path: Path, content: dict[str, Any]) -> None:
    image = noise(40, 60)
    folder = published(tmp_path, content)
    np.testing.assert_allclose(
        ImagePreprocessor.from_folder(folder)([np.asarray(image)]), theirs(folder, image), atol=1e-5
    )


@pytest.mark.parametrize("section", ["image_processor", "none", "null"])
def test_the_nested_file_counts(tmp_path: Path, section: str) -> None:
    """As in transformers 5: a preprocessor_config.json beside it is a stale one, unless nothing is nested."""
    nested = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": 24, "width": 24},
        "do_center_crop": False,
    }
    published(
        tmp_path,
        {"image_processor_type": "CLIPImageProcessor", "size": 30, "crop_size": 20, "image_mean": [0.1, 0.2, 0.3]},
    )
    published(
        tmp_path,
        {"image_processor": {"image_processor": nested, "null": None}[section]}
        if section != "none"
        else {"patch_size": 8},
        NESTED,
    )
    image = noise(40, 60)
    found = ImagePreprocessor.from_folder(tmp_path)
    np.testing.assert_allclose(found([np.asarray(image)]), theirs(tmp_path, image), atol=1e-5)
    assert Path(found.origin.partition(" (")[0]).name == (NESTED if section == "image_processor" else OWN)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor", "do_pad": True, "pad_size": {"height": 9, "width": 9}},
            "pad_size",
        ),
        ({"do_image_splitting": True}, "do_image_splitting"),
        (
            {"image_processor_type": "Qwen2VLImageProcessor"},
            "the class Qwen2VLImageProcessor is not supported, expected one of Llava",
        ),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "the class Siglip2ImageProcessor"),
        ({"size": {"longest_edge": 224}}, "size has longest_edge, expected shortest_edge, or height and width"),
        ({"size": {"shortest_edge": 0}}, "size shortest_edge"),
        ({"resample": 9}, "resample"),
        ({"do_center_crop": False}, "pictures would keep sizes of their own"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": None}, "do_normalize needs image_mean, which is null"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is 0"),
        ({"do_pad": True, "image_mean": 0.5}, "image_mean is one number"),
        ([], "an object of settings was expected"),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, config: object, named: str) -> None:
    (tmp_path / OWN).write_text(json.dumps(config))
    with pytest.raises(BundleError, match=rf"preprocessor_config\.json cannot be used: .*{named}"):
        ImagePreprocessor.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["[", "[]", '"x"', '{"image_processor": 3}', "\x00"])
def test_damaged_files(tmp_path: Path, content: str) -> None:
    (tmp_path / NESTED).write_text(content)
    with pytest.raises(BundleError, match=r"processor_config\.json cannot be used"):
        ImagePreprocessor.from_folder(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no image processor, neither"):
        ImagePreprocessor.from_folder(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"do_pad": True}])
def test_a_strip_cannot_fill_the_memory(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="less elongated"):
        ImagePreprocessor.model_validate(settings)([np.zeros((1, 60_000, 3), np.uint8)])


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_the_library_s(kind: str) -> None:
    ours, library = ImagePreprocessor.model_validate({"image_processor_type": kind}), LIBRARY[kind]()
    for name in (
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "do_normalize",
        "resample",
        "rescale_factor",
        "image_mean",
        "image_std",
    ):
        actual, expected = getattr(ours, name), getattr(library, name)
        assert (actual or None) == (expected or None), name
    for name in ("size", "crop_size"):
        size, expected = getattr(ours, name), getattr(library, name)
        assert (size.model_dump() if size else None) == (dict(expected) if expected else None), name
