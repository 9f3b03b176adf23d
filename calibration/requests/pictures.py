"""General pictures to ask about: photographs that scikit-image ships, and pages, plots and figures drawn with Pillow.

The photographs are files inside the installed package (skimage/data; the docstrings of `skimage.data` name authors and
licences), so nothing is downloaded. Drawn pictures are seeded, and words in them are in Pillow's own font.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import NotFound
from runtime.optional import require
from runtime.vision.images import Picture, decode_image

PHOTOGRAPHS: Final = (
    "astronaut.png",
    "coffee.png",
    "coins.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "grass.png",
)
"""A person, food, things to count, a workshop, printed text, a medical picture, a texture."""
HELD_OUT: Final = ("chelsea.png", "rocket.jpg", "camera.png", "text.png", "hubble_deep_field.jpg")
"""Photographs that only comparisons ask about: an animal, a launch site, a person, handwriting, stars."""
SIZE: Final = (448, 336)
"""Width and height of drawn pictures in pixels."""
INKS: Final = ("black", "navy", "darkred", "darkgreen", "purple", "teal", "saddlebrown")
PAPERS: Final = ("white", "ivory", "lightyellow", "aliceblue", "whitesmoke")
WORDS: Final = tuple(
    """
    invoice total amount date address order delivery quantity price meeting report summary winter summer energy water
    school garden station museum river mountain letter morning evening market harbour bridge recipe butter flour sugar
    minutes hours north south east west first second third open closed please thank you welcome
    """.split()
)

Drawing = Callable[[np.random.Generator], Picture]


def photograph(name: str) -> Picture:
    """A photograph of scikit-image, uint8 RGB [height, width, 3]. Raises MissingDependency, or NotFound where the
    installed version lacks it.
    """
    path = Path(str(require("skimage", "export").__file__)).parent / "data" / name
    if not path.is_file():
        raise NotFound(f"{path} does not exist: install scikit-image 0.26, which ships this picture")
    return decode_image(path.read_bytes(), name)


def document(rng: np.random.Generator) -> Picture:
    """A page: a heading and a few paragraphs."""
    image, draw = _canvas(rng)
    ink = _ink(rng)
    draw.text((24, 16), _words(rng, 2).title(), ink, _font(30))
    for line in range(int(rng.integers(5, 9))):
        draw.text((24, 70 + 28 * line), _words(rng, int(rng.integers(3, 6))), ink, _font(18))
    return _pixels(image)


def receipt(rng: np.random.Generator) -> Picture:
    """A table of things and their prices, with a total."""
    image, draw = _canvas(rng)
    prices = rng.integers(100, 9999, int(rng.integers(4, 7)))
    rows = [*((_words(rng, 1), int(price)) for price in prices), ("TOTAL", int(prices.sum()))]
    for place, (name, price) in enumerate(rows):
        top = 24 + 40 * place
        draw.text((40, top), name, "black", _font(22))
        draw.text((300, top), f"{price / 100:.2f}", "black", _font(22))
        draw.line((40, top + 32, 408, top + 32), "grey")
    return _pixels(image)


def bars(rng: np.random.Generator) -> Picture:
    """A bar chart with a title and labels."""
    image, draw = _canvas(rng)
    draw.text((60, 10), _words(rng, 3).title(), "black", _font(22))
    draw.line((50, 50, 50, 290, 430, 290), "black", 2)
    for place, height in enumerate(rng.integers(20, 230, 5)):
        left = 70 + 72 * place
        draw.rectangle((left, 290 - int(height), left + 48, 290), _ink(rng))
        draw.text((left, 296), _words(rng, 1)[:6], "black", _font(14))
        draw.text((left + 8, 270 - int(height)), str(height), "black", _font(14))
    return _pixels(image)


def curves(rng: np.random.Generator) -> Picture:
    """A plot of two curves with axes and a legend."""
    image, draw = _canvas(rng)
    draw.line((50, 30, 50, 300, 430, 300), "black", 2)
    x = np.arange(50, 430, 4)
    for place in range(2):
        ink, (phase, speed) = _ink(rng), rng.uniform((0, 0.01), (6, 0.05))
        y = 165 + rng.uniform(40, 110) * np.sin(phase + speed * x)
        draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], ink, 3)
        draw.text((330, 34 + 22 * place), _words(rng, 1), ink, _font(16))
    return _pixels(image)


def diagram(rng: np.random.Generator) -> Picture:
    """Boxes with words in them, joined by lines."""
    image, draw = _canvas(rng)
    boxes = [(left, top) for top in (40, 210) for left in (30, 170, 310)]
    middles = [(left + 55, top + 40) for left, top in boxes]
    draw.line([middles[place] for place in rng.permutation(len(boxes))], "grey", 3)
    for left, top in boxes:
        draw.rounded_rectangle((left, top, left + 110, top + 80), 12, "white", _ink(rng), 3)
        draw.text((left + 10, top + 28), _words(rng, 1), "black", _font(18))
    return _pixels(image)


def sketch(rng: np.random.Generator) -> Picture:
    """A drawing of houses, trees and a sun."""
    image, draw = _canvas(rng)
    draw.rectangle((0, 0, SIZE[0], 240), "skyblue")
    draw.rectangle((0, 240, *SIZE), "yellowgreen")
    draw.ellipse((360, 20, 420, 80), "gold")
    for left in range(20, 400, 130):
        if rng.random() < 0.6:
            draw.rectangle((left, 170, left + 90, 260), _ink(rng))
            draw.polygon([(left - 10, 170), (left + 45, 110), (left + 100, 170)], "firebrick")
            draw.rectangle((left + 35, 210, left + 55, 260), "white")
        else:
            draw.rectangle((left + 38, 200, left + 52, 270), "saddlebrown")
            draw.ellipse((left, 110, left + 90, 215), "forestgreen")
    return _pixels(image)


DRAWN: Final[tuple[Drawing, ...]] = (document, bars, sketch, receipt, curves, diagram)


def shown(i: int) -> Picture:
    """Photographs and drawn pictures alternate. The number of each differs, so that pictures meet other texts."""
    turn = i // 2
    if i % 2 == 0:
        return photograph(PHOTOGRAPHS[turn % len(PHOTOGRAPHS)])
    return DRAWN[turn % len(DRAWN)](np.random.default_rng(i))


def _canvas(rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", SIZE, PAPERS[rng.integers(len(PAPERS))])
    return image, ImageDraw.Draw(image)


def _pixels(image: Image.Image) -> Picture:
    return np.array(image, np.uint8)


def _ink(rng: np.random.Generator) -> str:
    return INKS[rng.integers(len(INKS))]


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[place] for place in rng.integers(len(WORDS), size=count))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
