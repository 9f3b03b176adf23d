"""The picture of a grid: its cells with the values of the axes beside them. Pixels are uint8 RGB.

Columns have their label above them, rows to their left, and blocks, which lie beside each other, above their columns.
The font is Pillow's own, which has the Latin letters.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import limits
from runtime.grid.plan import GridPlan
from runtime.vision.images import Picture

PAPER: Final = "white"
INK: Final = "black"
GAP: Final = 4
"""Pixels around a cell."""
SMALLEST: Final = 11
LARGEST: Final = 40
"""Heights of letters, in pixels."""
SHARE: Final = 14
"""The height of letters is this part of a cell's edge."""
NARROWEST: Final = 160
"""Pixels that the label of a row may take at least, beside small cells."""
LINES: Final = 4
"""A label has no more lines; what is left out is an ellipsis."""
LETTERS: Final = 400
"""No more letters of a label are measured."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Label:
    """A text in lines that are no wider than their place."""

    lines: tuple[str, ...]
    width: int
    height: int


def grid_picture(plan: GridPlan, cells: Sequence[Picture]) -> Picture:
    """The labelled picture of all cells, in the order of `plan.cells`. Cells of different sizes are centred. Raises
    InvalidInput naming "grid" where it would have more pixels than a picture may have.
    """
    columns, rows, blocks = plan.shape
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    font = ImageFont.load_default(max(SMALLEST, min(LARGEST, min(width, height) // SHARE)))
    above = [_label(font, text, width) for text in plan.axis("x").labels()]
    beside = [_label(font, text, max(width, NARROWEST)) for text in plan.axis("y").labels()]
    over = [_label(font, text, columns * (width + 2 * GAP)) for text in plan.axis("z").labels()]
    left, head = max(label.width for label in beside), max(label.height for label in above)
    top = head + max(label.height for label in over)
    row_heights = [max(height, label.height) + 2 * GAP for label in beside]
    block = left + columns * (width + 2 * GAP)
    size = blocks * block, top + sum(row_heights)
    limits.PICTURE_PIXELS.count("grid", size[0] * size[1])
    page = Image.new("RGB", size, PAPER)
    draw, tops = ImageDraw.Draw(page), [top, *accumulate(row_heights, initial=top)][1:]
    for z in range(blocks):
        x0 = z * block
        _write(draw, font, over[z], x0 + left, 0, block - left)
        for x, label in enumerate(above):
            _write(draw, font, label, x0 + left + x * (width + 2 * GAP), top - head, width + 2 * GAP)
        for y, label in enumerate(beside):
            _write(draw, font, label, x0, tops[y] + (row_heights[y] - label.height) // 2, left)
            for x in range(columns):
                cell = cells[(z * rows + y) * columns + x]
                down, across = row_heights[y] - cell.shape[0], width + 2 * GAP - cell.shape[1]
                place = x0 + left + x * (width + 2 * GAP) + across // 2, tops[y] + down // 2
                page.paste(Image.fromarray(cell), place)
    return np.array(page, np.uint8)


def _label(font: Font, text: str, width: int) -> _Label:
    """The text in lines of at most `width` pixels; no lines and no size for an empty one."""
    if not text:
        return _Label((), 0, 0)
    lines = _lines(font, text if len(text) <= LETTERS else f"{text[:LETTERS]}…", width - 2 * GAP)
    return _Label(lines, math.ceil(max(map(font.getlength, lines))) + 2 * GAP, len(lines) * _step(font) + 2 * GAP)


def _lines(font: Font, text: str, width: int) -> tuple[str, ...]:
    lines, line = list[str](), ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        lines += [line] if line else []
        line = _cut(font, word, width)
    lines.append(line)
    return tuple(lines) if len(lines) <= LINES else (*lines[: LINES - 1], _cut(font, f"{lines[LINES - 1]} …", width))


def _cut(font: Font, text: str, width: int) -> str:
    """The text, or as much of its beginning as there is room for, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda count: math.ceil(font.getlength(f"{text[:count]}…")))
    return f"{text[: max(0, fits - 1)]}…"


def _step(font: Font) -> int:
    """From one line to the next, in pixels."""
    return int(font.getbbox("Ålgy|")[3]) + 2


def _write(draw: ImageDraw.ImageDraw, font: Font, label: _Label, x: int, y: int, width: int) -> None:
    """Write a label into a place of this width, each line in its middle."""
    for i, line in enumerate(label.lines):
        draw.text((x + (width - font.getlength(line)) // 2, y + GAP + i * _step(font)), line, INK, font)
