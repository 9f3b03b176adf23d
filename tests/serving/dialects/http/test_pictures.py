"""Pictures in JSON."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import pytest

from runtime import limits
from runtime.errors import InvalidInput
from runtime.vision.images import encode_image
from serving.dialects.http.pictures import file_of, file_text, files_of

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
TEXT = base64.b64encode(encode_image(PICTURE)).decode()


@pytest.mark.parametrize(
    "text",
    [TEXT, f"data:image/png;base64,{TEXT}", f"DATA:image/jpeg;charset=x;BASE64,{TEXT}", TEXT[:40] + "\r\n" + TEXT[40:]],
)
def test_a_file_in_a_text(text: str) -> None:
    file = file_of(text, "image")
    assert file.size == (6, 4) and np.array_equal(file.decode(), PICTURE)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no PNG, JPEG"),
        ("not base64!", "is no base64"),
        (TEXT[:-3], "is no base64"),
        ("é", "is no base64"),
        ("\ud800", "is no base64"),
        ("data:image/png," + TEXT, "is a data: URL without base64"),
        ("data:image/png;base64", "is a data: URL without base64"),
        ("https://example.org/a.png", "is no base64"),
        ("/etc/hostname", "is no base64"),
        (base64.b64encode(b"x" * 100).decode(), "is no PNG, JPEG"),
    ],
)
def test_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        file_of(text, "images[3]")
    assert caught.value.field == "images[3]"


def test_several() -> None:
    files = asyncio.run(files_of([TEXT, TEXT], "images"))
    assert [file.field for file in files] == ["images[0]", "images[1]"]
    with pytest.raises(InvalidInput, match=r"^images\[1\]: is no base64"):
        asyncio.run(files_of([TEXT, "?"], "images"))
    with pytest.raises(InvalidInput, match=f"images: has {limits.PICTURES.most + 1} pictures"):
        asyncio.run(files_of(["?"] * (limits.PICTURES.most + 1), "images"))


def test_there_and_back() -> None:
    assert np.array_equal(file_of(asyncio.run(file_text(PICTURE)), "image").decode(), PICTURE)
