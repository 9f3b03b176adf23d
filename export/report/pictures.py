"""Pictures of a report: read from a bundle, subtracted from each other, and written into a page."""

from __future__ import annotations

import base64
from typing import Final

import numpy as np

from runtime.bundle.manifest import Bundle
from runtime.errors import BundleError, InvalidInput
from runtime.vision.images import Picture, decode_image, encode_image

GAIN: Final = 8
"""How much the difference of two pictures is amplified: 32 levels of 255 become white."""


def difference(one: Picture, other: Picture) -> Picture:
    """|one - other| in each channel, `GAIN` times amplified: uint8 RGB [height, width, 3]."""
    return np.asarray((np.abs(one.astype(np.int32) - other) * GAIN).clip(0, 255), np.uint8)


def stored(bundle: Bundle, path: str) -> Picture:
    """A picture of the bundle, decoded, so that nothing else of its file reaches the page."""
    file = bundle.root / path
    if not file.is_file():
        raise BundleError(f"{file} is missing, which the quality report shows. Build the bundle again")
    try:
        return decode_image(file.read_bytes(), path)
    except InvalidInput as error:
        raise BundleError(f"{file} cannot be shown: {error}. Build the bundle again") from None


def data_uri(picture: Picture) -> str:
    """A picture as a data URI of its PNG file."""
    return f"data:image/png;base64,{base64.b64encode(encode_image(picture)).decode()}"
