"""Texts inside picture files: those of PNG files by keyword (PNG specification, third edition, section 11.3.3), and the
comment in the EXIF data of others (EXIF 2.32, tag UserComment).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from PIL import Image
from PIL.ExifTags import IFD
from PIL.ExifTags import Base as Tag

from runtime.vision.images import MAX_PIXELS, UNICODE, opened

COMMENT: Final = "UserComment"
"""The name of a comment in EXIF data."""
ASCII: Final = b"ASCII\x00\x00\x00"
CODE: Final = 8
"""Bytes of the character code before a comment."""
UTF16: Final = ("utf-16-be", "utf-16-le")


def texts_of(data: bytes, field: str) -> dict[str, str]:
    """The texts of a picture file by keyword; a comment in its EXIF data is under `COMMENT`. Only what stands before
    the pixels is read. Raises InvalidInput naming `field` as `runtime.vision.images.decode_image` does.
    """
    with opened(data, field, MAX_PIXELS) as image:
        found = dict(_comments(image))
        if image.format == "PNG":
            found |= {str(name): value for name, value in image.info.items() if isinstance(value, str)}
        return found


def _comments(image: Image.Image) -> Iterator[tuple[str, str]]:
    exif = Image.Image.getexif(image)  # PNG files' own getexif would decode the pixels
    comment = exif.get_ifd(IFD.Exif).get(Tag.UserComment)
    if isinstance(comment, bytes) and (text := _decoded(comment)):
        yield COMMENT, text


def _decoded(comment: bytes) -> str:
    """The text of a comment, with the order of bytes that leaves fewer letters of other alphabets: writers differ."""
    code, text = comment[:CODE], comment[CODE:]
    if code == ASCII:
        return text.decode("ascii", errors="replace").rstrip("\x00")
    if code == UNICODE:
        tries = [text.decode(name, errors="replace") for name in UTF16]
        return min(tries, key=lambda one: sum(ord(letter) > 0xFF for letter in one)).rstrip("\x00")
    return comment.decode(errors="replace").rstrip("\x00")
