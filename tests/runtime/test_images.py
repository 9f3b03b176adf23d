"""Decoding survives anything; preprocessing equals transformers'."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil
from transformers.image_transforms import convert_to_rgb

from runtime.errors import BundleError, InvalidInput
from runtime.images import ImagePreprocessor, decode_image, encode_image

RNG = np.random.default_rng(0)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), np.uint8))


MODES = {"PNG": "1 L LA P RGB RGBA I;16", "JPEG": "L RGB CMYK", "WEBP": "L LA P RGB RGBA", "BMP": "1 L P RGB RGBA"}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes.split()])
def test_decode_equals_transformers(kind: str, mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 65536, (5, 7), np.uint16)) if mode == "I;16" else noise(5, 7, 4).convert(mode)
    data = file_of(image, kind)
    np.testing.assert_array_equal(decode_image(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))


def test_transparent_palette_is_laid_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    assert decode_image(file_of(image, transparency=0)).tolist() == [[[255, 255, 255], [0, 255, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data), np.array(upright))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_files_are_refused(kind: str) -> None:
    data = file_of(noise(40, 40), kind)
    for damaged in (b"", data[:10], data[: len(data) // 2], b"GIF89a" + data[6:]):
        with pytest.raises(InvalidInput, match=r"^messages\[0\]"):
            decode_image(damaged, "messages[0]")


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 150))
def test_any_bytes_decode_or_are_refused(garbage: bytes, at: int) -> None:
    data = file_of(Image.new("RGB", (4, 4)))
    for candidate in (garbage, data[:at] + garbage, data[:at] + garbage + data[at + len(garbage) :]):
        try:
            assert decode_image(candidate).shape[2] == 3
        except InvalidInput:
            continue


@pytest.mark.parametrize("edge", [8_001, 10_000, 14_000])
def test_large_pictures_are_refused_by_their_header(edge: int) -> None:
    header = file_of(Image.new("1", (edge, edge)))[:100]  # there are no pixels to decode
    with pytest.raises(InvalidInput, match="more than 64 megapixels"):
        decode_image(header)


def test_encoding() -> None:
    image = np.asarray(noise(9, 11))
    np.testing.assert_array_equal(decode_image(encode_image(image)), image)
    smooth = np.asarray(Image.new("RGB", (9, 11), "teal"))
    assert np.abs(decode_image(encode_image(smooth, "jpeg")).astype(int) - smooth).max() < 4
    with pytest.raises(InvalidInput, match="expected uint8"):
        encode_image(image.astype(np.float32))


@settings(deadline=None)
@given(st.data())
def test_preprocessing_equals_transformers(data: st.DataObject) -> None:
    length = st.integers(1, 40)
    config: dict[str, Any] = {
        "size": data.draw(
            st.one_of(st.builds(lambda n: {"shortest_edge": n}, length), st.builds(lambda h, w: {"height": h, "width": w}, length, length))
        ),
        "crop_size": {"height": data.draw(length), "width": data.draw(length)},
        "resample": data.draw(st.sampled_from([0, 1, 2, 3, 4, 5])),
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
        "rescale_factor": data.draw(st.sampled_from([1 / 255, 0.01])),
    }
    config |= {f"do_{step}": data.draw(st.booleans()) for step in ("resize", "rescale", "normalize", "center_crop")}
    if "height" not in config["size"] or not config["do_resize"]:
        config["do_center_crop"] = True
    image = np.asarray(noise(data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))))
    expected = np.asarray(CLIPImageProcessorPil(**config)(Image.fromarray(image), return_tensors="np")["pixel_values"], np.float32)
    preprocessor = ImagePreprocessor.model_validate(config)
    actual = preprocessor([image])
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual.dtype == np.float32
    assert actual.shape[2:] == (preprocessor.output_size.height, preprocessor.output_size.width)


@pytest.mark.parametrize(("name", "nested"), [("preprocessor_config.json", False), ("processor_config.json", True)])
def test_published_files(tmp_path: Path, name: str, nested: bool) -> None:
    reference = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24})
    written = json.loads(reference.to_json_string())
    (tmp_path / name).write_text(json.dumps({"image_processor": written} if nested else written))
    image = np.asarray(noise(50, 70))
    expected = reference(Image.fromarray(image), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ImagePreprocessor.from_folder(tmp_path)([image, image]), np.concatenate([expected] * 2), atol=1e-5)


def test_sizes_of_old_files() -> None:
    old = ImagePreprocessor.model_validate({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 24})
    image = np.asarray(noise(50, 70))
    expected = CLIPImageProcessorPil(size=32, crop_size=24)(Image.fromarray(image), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(old([image]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"do_pad": True},
        {"do_image_splitting": True},
        {"image_processor_type": "Qwen2VLImageProcessor"},
        {"size": {"longest_edge": 224}},
        {"size": {"shortest_edge": 0}},
        {"resample": 9},
        {"do_center_crop": False},
        {"do_convert_rgb": False},
        {"image_mean": [0.5]},
        [],
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, config: object) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"preprocessor_config\.json cannot be used"):
        ImagePreprocessor.from_folder(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="neither"):
        ImagePreprocessor.from_folder(tmp_path)


def test_a_strip_cannot_fill_the_memory() -> None:
    with pytest.raises(InvalidInput, match="less elongated"):
        ImagePreprocessor()([np.zeros((1, 60_000, 3), np.uint8)])
