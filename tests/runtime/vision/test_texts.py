"""Texts inside picture files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InvalidInput
from runtime.vision.images import encode_image
from runtime.vision.texts import COMMENT, texts_of

PICTURE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


@pytest.mark.parametrize("text", ["a circle\nSteps: 2", "ein Kreis für 圆", "a" * 10_000])
def test_texts_of_a_png_file(text: str) -> None:
    file = encode_image(PICTURE, texts={"parameters": text, "Software": "x"})
    assert texts_of(file, "image") == {"parameters": text, "Software": "x"}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\x00" + "für 2".encode("utf-16-be"),
        b"UNICODE\x00" + "für 2".encode("utf-16-le"),
        b"\x00" * 8 + "für 2".encode(),
    ],
)
def test_comments_of_other_files(kind: str, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    out = io.BytesIO()
    Image.fromarray(PICTURE).save(out, kind, exif=exif)
    assert texts_of(out.getvalue(), "image")[COMMENT].strip("\x00") == "für 2"


def test_files_without_texts() -> None:
    assert texts_of(encode_image(PICTURE), "image") == {}
    with pytest.raises(InvalidInput, match=r"^image: "):
        texts_of(b"nothing", "image")


def test_a_text_that_unpacks_to_much_is_refused() -> None:
    import struct
    import zlib

    packed = b"parameters\x00\x00" + zlib.compress(b"a" * (80 << 20))
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    file = encode_image(PICTURE)
    with pytest.raises(InvalidInput, match=r"^image: is a damaged picture"):
        texts_of(file[:33] + chunk + file[33:], "image")
