"""Pictures as sixels, six pixels above each other a character (DEC, VT330/VT340 Programmer Reference Manual, ch. 14).

xterm, foot, mlterm, Windows Terminal and others show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.vision.images import Picture

BEGIN, END = "\x1bP0;1q", "\x1b\\"
HEIGHT: Final = 6
"""Pixels of a character."""
COLOURS: Final = 256
ZERO: Final = ord("?")
"""The character without any pixel."""
SHORT: Final = 3
"""Characters that are written out; of more, the number is."""


def sixels(picture: Picture) -> str:
    """The command that shows a picture, in at most 256 colours."""
    image = Image.fromarray(picture).quantize(COLOURS)
    height, width = picture.shape[:2]
    palette = np.reshape(image.getpalette() or (), (-1, 3)).astype(int) * 100 // 255
    colours = "".join(f"#{n};2;{red};{green};{blue}" for n, (red, green, blue) in enumerate(palette))
    pixels = np.asarray(image, np.uint8)
    bands = (_band(pixels[top : top + HEIGHT]) for top in range(0, height, HEIGHT))
    return f'{BEGIN}"1;1;{width};{height}{colours}{"-".join(bands)}{END}'


def _band(pixels: NDArray[np.uint8]) -> str:
    """Rows of colour numbers, at most six: a line over the other for each colour."""
    weights = 1 << np.arange(len(pixels))
    return "$".join(f"#{colour}{''.join(_runs(weights @ (pixels == colour)))}" for colour in np.unique(pixels))


def _runs(bits: NDArray[np.int64]) -> Iterator[str]:
    for value, found in groupby(bits.tolist()):
        count, character = len(list(found)), chr(ZERO + value)
        yield character * count if count <= SHORT else f"!{count}{character}"
