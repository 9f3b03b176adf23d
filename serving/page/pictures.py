"""Files of the pictures that a page has drawn, with their parameters in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np

from runtime.diffusion.infotext import KEY, Infotext, told
from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular
from runtime.limits import PICTURE_BYTES
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import encode_image
from runtime.vision.texts import texts_of

KEPT_SECONDS: Final = 24 * 3600
"""How long files of pictures are kept."""


def fresh(folder: Path) -> Path:
    """A folder of pictures, without those that are too old."""
    for old in folder.glob("*.png"):
        with suppress(FileNotFoundError):  # another request has removed it
            if old.stat().st_mtime < time.time() - KEPT_SECONDS:
                old.unlink()
    return folder


def saved(folder: Path, request: ImageRequest, ready: ImageReady, facts: Mapping[str, str]) -> tuple[Path, str]:
    """Write a drawn picture into a folder, as a PNG file with its parameters: the prompts are those that scripts made,
    and `facts` are further ones. Returns the file and the parameters.
    """
    picture = np.asarray(ready.image, np.uint8)
    text = told(request, ready, facts)
    path = fresh(folder) / f"{ready.seed}-{uuid4().hex}.png"
    path.write_bytes(encode_image(picture, texts={KEY: text}))
    return path, text


def read(path: Path) -> bytes:
    """A picture file of the page. Raises InvalidInput for one that is too large, and NotFound."""
    try:
        return read_regular(path, PICTURE_BYTES.most)
    except OSError:
        raise NotFound("the picture is not there any more: upload it again") from None


def parameters(path: Path) -> str:
    """The parameters in a picture file. Raises InvalidInput where it is no picture or has none, and NotFound."""
    found = texts_of(read(path), "picture").get(KEY, "")
    if not found.strip():
        raise InvalidInput(
            "picture", "has no parameters in it: only PNG files that a program wrote them into have some"
        )
    return found


def fields_of(text: str) -> Mapping[str, Any]:
    """The fields of a request that a text of parameters has. Raises InvalidInput."""
    if not text.strip():
        raise InvalidInput("parameters", "are empty: paste the text of a picture's parameters")
    return Infotext.parse(text).fields()
