"""Every format is read as its specification says, sizes are known before pixels are decoded, and no file does harm."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from pillow_heif import register_heif_opener
from transformers.image_transforms import convert_to_rgb

from runtime.errors import InvalidInput
from runtime.vision.images import FORMATS, PictureFile, decode_image, encode_image

RNG = np.random.default_rng(0)
ORIENTATION = 0x0112
Samples = NDArray[np.int64]
register_heif_opener()


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    """Differs in every direction, and survives lossy compression."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 200 // width, y * 200 // height, np.full_like(x, 60)], axis=-1).astype(np.uint8)
    )


MODES = {
    "PNG": "1 L LA P RGB RGBA", "JPEG": "L RGB CMYK", "WEBP": "L LA P RGB RGBA", "BMP": "1 L P RGB RGBA",
    "GIF": "1 L P RGB",
    "TIFF": "1 L LA P RGB RGBA CMYK YCbCr", "AVIF": "L LA RGB RGBA", "HEIF": "L LA RGB RGBA",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes.split()])
def test_decode_equals_transformers(kind: str, mode: str) -> None:
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read such a file, not even one that it wrote")
    data = file_of(noise(5, 7, 4).convert(mode), kind)
    np.testing.assert_array_equal(decode_image(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))


# PNG, as its specification has it


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: Samples, depth: int, colour: int, *chunks: bytes, late: bytes = b"") -> bytes:
    """A file of samples [height, width, channels]: written here, since Pillow writes few of the kinds."""
    height, width, _ = samples.shape
    rows = []
    for row in samples.reshape(height, -1):
        if depth < 8:
            bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
            rows.append(b"\0" + np.packbits(bits.reshape(-1)).tobytes())
        else:
            rows.append(b"\0" + row.astype(f">u{depth // 8}").tobytes())
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + pixels + late + chunk(b"IEND", b"")


COLOURS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Channels by PNG's colour type: grey, RGB, grey with alpha, RGB with alpha."""
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)]


@pytest.mark.parametrize(
    ("colour", "depth", "transparent"),
    [
        (colour, depth, transparent)
        for colour, depth in KINDS
        for transparent in (False, True)
        if colour in (0, 2) or not transparent
    ],
)
def test_png_equals_its_specification(colour: int, depth: int, transparent: bool) -> None:
    """Levels are 255 sample / largest; a colour in tRNS is transparent; alpha mixes with white. 16-bit colours may lose
    the low byte.
    """
    channels, largest = COLOURS[colour], 2**depth - 1
    samples = RNG.integers(0, largest + 1, (5, 7, channels))
    samples[0, 0], samples[4, 6] = 0, largest
    colours = samples if channels in (1, 3) else samples[..., :-1]
    alpha = samples[..., -1:] / largest if channels in (2, 4) else np.ones((5, 7, 1))
    chunks = []
    if transparent:
        chunks.append(chunk(b"tRNS", samples[2, 3].astype(">u2").tobytes()))
        alpha = 1.0 - (samples == samples[2, 3]).all(axis=-1, keepdims=True)
    expected = np.broadcast_to(colours / largest * alpha * 255 + (1 - alpha) * 255, (5, 7, 3))
    actual = decode_image(png(samples, depth, colour, *chunks))
    exact = (depth < 16 and channels in (1, 3)) or colour == 0
    assert np.abs(actual - expected).max() <= (0.5 if exact else 1.6)


def test_a_ramp_of_16_bits_has_the_mean_of_8() -> None:
    ramp = np.arange(65536).reshape(256, 256, 1)
    picture = decode_image(png(ramp, 16, 0))
    assert picture.mean() == 127.5 and picture.min() == 0 and picture.max() == 255
    np.testing.assert_array_equal(picture[..., 0].reshape(-1), np.floor(ramp.reshape(-1) * 255 / 65535 + 0.5))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_with_transparency(depth: int) -> None:
    indices = RNG.integers(0, 2**depth, (4, 6, 1))
    palette = RNG.integers(0, 256, (2**depth, 3))
    alphas = RNG.integers(0, 256, 2**depth - 1)
    data = png(
        indices,
        depth,
        3,
        chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
        chunk(b"tRNS", alphas.astype(np.uint8).tobytes()),
    )
    alpha = (np.append(alphas, 255) / 255)[indices]
    expected = palette[indices[..., 0]] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(data) - expected).max() <= 1


# 16 bits and other kinds of TIFF


@pytest.mark.parametrize(("order", "zero"), [("<", 1), (">", 1), ("<", 0)])
def test_tiff_of_16_bits(order: str, zero: int) -> None:
    """In both byte orders, and where 0 is white."""
    samples = np.arange(65536, dtype=np.uint32).reshape(256, 256)
    tags = {
        256: (3, 256),
        257: (3, 256),
        258: (3, 16),
        259: (3, 1),
        262: (3, zero),
        273: (4, 8),
        277: (3, 1),
        278: (3, 256),
        279: (4, 131072),
    }
    pixels = samples.astype(f"{order}u2").tobytes()
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value))
        for tag, (kind, value) in tags.items()
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    data = head + pixels + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0"
    expected = np.floor(samples * 255 / 65535 + 0.5)
    np.testing.assert_array_equal(decode_image(data)[..., 0], expected if zero else 255 - expected)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_values_without_a_brightness_are_refused(mode: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^m: is a TIFF picture with pixels of kind {mode}, expected 8 or 16 bits"):
        decode_image(file_of(Image.new(mode, (4, 4)), "TIFF"), "m")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiff(compression: str) -> None:
    image = smooth(24, 40)
    data = file_of(image, "TIFF", compression=compression)
    assert np.abs(decode_image(data).astype(int) - np.asarray(image)).max() <= (12 if compression == "jpeg" else 0)


def test_faxes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="is a TIFF picture with group4 compression, expected none, LZW"):
        decode_image(file_of(Image.new("1", (8, 8)), "TIFF", compression="group4"))


# Frames and orientation


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(data).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    image = smooth(24, 40)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file_of(image, exif=exif)))))
    data = file_of(image, kind, exif=exif)
    opened = PictureFile.open(data, "m")
    assert opened.size == upright.shape[1::-1]
    for picture in (decode_image(data), opened.resized(opened.size, Image.Resampling.NEAREST)):
        assert picture.shape == upright.shape and np.abs(picture.astype(int) - upright).max() <= 12


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_heic(orientation: int) -> None:
    """The container says how it is turned; EXIF tags that say so again do not count twice."""
    image = smooth(64, 96)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file_of(image, exif=exif)))))
    data = file_of(image, "HEIF", exif=exif.tobytes(), quality=90)
    opened = PictureFile.open(data, "m")
    assert opened.size == upright.shape[1::-1]
    assert np.abs(opened.decode().astype(int) - upright).max() <= 16


def test_png_may_say_its_orientation_last() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    samples = RNG.integers(0, 256, (3, 5, 3))
    data = png(samples, 8, 2, late=chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    assert PictureFile.open(data, "m").size == (3, 5)
    np.testing.assert_array_equal(decode_image(data), np.rot90(samples, -1))


# Limits and damage


def samples_of() -> dict[str, bytes]:
    """A small file of each format."""
    return {kind: file_of(smooth(40, 56), kind) for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_sizes_are_read_without_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(noise(40, 56), kind)

    def load(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(type(Image.open(io.BytesIO(data))), "load", load)
    assert PictureFile.open(data, "m").size == (56, 40)


@pytest.mark.parametrize("edge", [8_001, 10_000, 14_000])
def test_large_pictures_are_refused_by_their_header(edge: int) -> None:
    header = file_of(Image.new("1", (edge, edge)))[:100]  # there are no pixels to decode
    with pytest.raises(InvalidInput, match="more than 64 megapixels"):
        decode_image(header)


@pytest.mark.parametrize("kind", FORMATS)
def test_limits_hold_for_every_format(kind: str) -> None:
    with pytest.raises(InvalidInput, match=r"^m: holds more than 0\.002 megapixels"):
        decode_image(file_of(noise(40, 56), kind), "m", max_pixels=2000)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_refused(kind: str) -> None:
    data = file_of(noise(40, 40), kind)
    for damaged in (b"", data[:10], data[: len(data) // 2], b"\0\0\0\0" + data[4:20]):
        with pytest.raises(InvalidInput, match=r"^messages\[0\]"):
            decode_image(damaged, "messages[0]")


def test_a_picture_without_memory_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    data = encode_image(np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    with pytest.raises(MemoryError):
        decode_image(data)


def test_other_formats_are_not_opened() -> None:
    for kind in ("PPM", "TGA", "ICO", "JPEG2000"):
        with pytest.raises(InvalidInput, match=r"is no PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF or HEIC picture"):
            decode_image(file_of(noise(16, 16), kind))


FILES = samples_of()


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40)
@given(data=st.data())
def test_mutated_files_decode_or_are_refused(kind: str, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in, anywhere: most of the effect is in headers, so those are hit more often."""
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 120), st.integers(0, len(content))))
        width = data.draw(st.sampled_from([0, 1, 4]))
        content[at : at + width] = data.draw(st.binary(max_size=8))
    try:
        assert decode_image(bytes(content), max_pixels=1_000_000).shape[2] == 3
    except InvalidInput:
        return


@given(st.binary(max_size=200), st.integers(0, 150))
def test_any_bytes_decode_or_are_refused(garbage: bytes, at: int) -> None:
    data = file_of(Image.new("RGB", (4, 4)))
    for candidate in (garbage, data[:at] + garbage, data[:at] + garbage + data[at + len(garbage) :]):
        try:
            assert decode_image(candidate).shape[2] == 3
        except InvalidInput:
            continue


def test_encoding() -> None:
    image = np.asarray(noise(9, 11))
    np.testing.assert_array_equal(decode_image(encode_image(image)), image)
    plain = np.asarray(Image.new("RGB", (9, 11), "teal"))
    assert np.abs(decode_image(encode_image(plain, "jpeg")).astype(int) - plain).max() < 4
    with pytest.raises(InvalidInput, match="expected uint8"):
        encode_image(image.astype(np.float32))
    long = {"parameters": "a" * 32_600}
    with pytest.raises(InvalidInput, match="image: cannot hold a text of 65,208 bytes as JPEG"):
        encode_image(image, "jpeg", texts=long)
    assert encode_image(image, "webp", texts=long)
    assert encode_image(image, "jpeg", texts={"parameters": "a" * 32_400})


TURNED = range(1, 9)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "I;16", "CMYK"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_file_is_resized_in_strips_to_the_same_pixels(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.vision.images.STRIP", 500)
    random = np.random.default_rng(orientation)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65535, (67, 41), np.uint16))
    else:
        image = (
            Image.fromarray(random.integers(0, 255, (67, 41, 4), np.uint8), "RGBA")
            .convert("RGB" if mode == "CMYK" else "RGBA")
            .convert(mode)
        )
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "jpeg" if mode == "CMYK" else "png", exif=exif)
    whole, opened = decode_image(file.getvalue()), PictureFile.open(file.getvalue(), "x")
    assert opened.size == (whole.shape[1], whole.shape[0])
    for size, resample in (((24, 24), Image.Resampling.BICUBIC), ((90, 30), Image.Resampling.LANCZOS)):
        np.testing.assert_array_equal(
            opened.resized(size, resample), np.array(Image.fromarray(whole).resize(size, resample))
        )


@pytest.mark.parametrize(
    ("mode", "kind", "size"),
    [
        ("1", "png", (8000, 8000)),
        ("L", "png", (8000, 5100)),
        ("RGBA", "png", (6000, 4300)),
        ("RGB", "webp", (5000, 3500)),
    ],
)
def test_what_decoding_would_take_is_read_from_the_header(mode: str, kind: str, size: tuple[int, int]) -> None:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **({"method": 0} if kind == "webp" else {"compress_level": 1}))
    with pytest.raises(
        InvalidInput, match=r"messages\[0\]: has .* bytes of memory to decode it in, expected at most 201,326,592"
    ):
        PictureFile.open(file.getvalue(), "messages[0]")


def test_a_picture_file_beyond_its_bytes() -> None:
    with pytest.raises(InvalidInput, match="has 16,777,217 bytes"):
        PictureFile.open(b"\0" * ((16 << 20) + 1), "x")
