"""The files of pictures in responses, in the format that a client has chosen (samples_format)."""

from __future__ import annotations

import base64
from typing import Final

from runtime.diffusion.infotext import KEY
from runtime.vision.images import Encoding, Picture, encode_image
from serving.dialects.a1111.fields import Options

KINDS: Final[dict[str, Encoding]] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
QUALITY: Final = 80
"""The quality of JPEG and WebP files, unless a client chose another one (jpeg_quality)."""


def encoded(picture: Picture, parameters: str, options: Options) -> str:
    """A picture as a file in base64, with its parameters unless the options leave them out (enable_pnginfo)."""
    texts = {KEY: parameters} if parameters and options.enable_pnginfo is not False else {}
    kind, quality = KINDS[options.samples_format or "png"], options.jpeg_quality or QUALITY
    return base64.b64encode(encode_image(picture, kind, quality, texts)).decode()
