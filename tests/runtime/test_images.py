"""Decoding survives anything."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from runtime.errors import InvalidInput
from runtime.images import decode_image, encode_image

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
