"""Pictures in JSON: files in base64, as clients send and receive them. Decoding and encoding are done in threads."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Final

from runtime import limits
from runtime.errors import InvalidInput
from runtime.vision.images import Encoding, Picture, PictureFile, encode_image

SCHEME: Final = "data:"
MARK: Final = ";base64"
LINES: Final = str.maketrans("", "", "\r\n")
"""Base64 may have line breaks (RFC 2045)."""


def file_of(text: str, field: str) -> PictureFile:
    """The picture file in a text: base64 (RFC 4648), or a data: URL with it (RFC 2397). Its pixels are not decoded yet.

    Raises InvalidInput naming `field`.
    """
    return PictureFile.open(_decoded(text, field), field)


async def files_of(texts: Sequence[str], field: str) -> tuple[PictureFile, ...]:
    """The picture files in texts; `field` is that of the list. Raises InvalidInput naming the field and the number."""
    limits.PICTURES.length(field, texts)
    return await asyncio.to_thread(lambda: tuple(file_of(text, f"{field}[{i}]") for i, text in enumerate(texts)))


async def file_text(picture: Picture, kind: Encoding = "png", quality: int = 95) -> str:
    """A uint8 RGB picture [height, width, 3] as a file in base64; `quality` 0 to 100 is for JPEG and WebP."""
    return await asyncio.to_thread(lambda: base64.b64encode(encode_image(picture, kind, quality)).decode())


def _decoded(text: str, field: str) -> bytes:
    if text[: len(SCHEME)].lower() == SCHEME:
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(MARK):
            raise InvalidInput(field, f"is a data: URL without base64, expected {SCHEME}image/png{MARK},...")
    try:
        return base64.b64decode(text.translate(LINES), validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters that are not ASCII
        raise InvalidInput(field, "is no base64: send the bytes of a picture file, encoded") from None
