"""Pictures shown in the terminal, by the protocol that it has, or as blocks of two pixels.

kitty's graphics protocol (https://sw.kovidgoyal.net/kitty/graphics-protocol) is also Ghostty's; iTerm2's inline images
(https://iterm2.com/documentation-images.html) are also WezTerm's and mintty's. Inside tmux and screen neither works.
Terminals with sixels do not say so in a variable, but for some that are known by their names.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from runtime.errors import InvalidInput
from runtime.vision.images import Picture, encode_image
from serving.cli.options import Way
from serving.cli.repl.sixel import sixels

CELL: Final = (8, 16)
"""Width and height of a character in pixels, where the terminal does not say."""
MARGIN: Final = 3
"""Lines of the terminal that a picture leaves free."""
CHUNK: Final = 4096
"""The most base64 of one command of kitty's protocol."""
COLUMNS: Final = 80
"""The most columns of a picture of blocks."""
SIXEL: Final = ("foot", "mlterm", "yaft", "contour")
"""What the names of terminals with sixels begin with."""
ITERM: Final = ("iTerm.app", "WezTerm", "mintty")


def detected(environment: Mapping[str, str]) -> Way:
    """The best way of the terminal that these variables describe."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    inside = "TMUX" in environment or term.startswith(("screen", "tmux"))
    if "NO_COLOR" in environment or term in ("", "dumb"):
        return "never"
    if not inside and ("KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty")):
        return "kitty"
    if not inside and (program in ITERM or environment.get("LC_TERMINAL") == "iTerm2"):
        return "iterm"
    if not inside and term.startswith(SIXEL):
        return "sixel"
    return "blocks" if environment.get("COLORTERM") in ("truecolor", "24bit") else "never"


def check_way(way: Way) -> None:
    """Raise InvalidInput for a way to show pictures where standard output is no terminal: control sequences are for
    terminals alone.
    """
    if way not in ("auto", "never") and not sys.stdout.isatty():
        raise InvalidInput("pictures", f"is {way}, and standard output is no terminal: leave it out, or set never")


def show(picture: Picture, way: Way, lines: int | None = None) -> None:
    """Show a picture on standard output, at most so many `lines` high. Does nothing where that is no terminal, or one
    that cannot show it.
    """
    if not sys.stdout.isatty():
        return
    chosen = detected(os.environ) if way == "auto" else way
    size = shutil.get_terminal_size()
    rows = max(1, min(size.lines - MARGIN, lines or size.lines))
    match chosen:
        case "kitty":
            _write("".join(kitty(_file(picture, size.columns, rows))))
        case "iterm":
            _write(iterm(_file(picture, size.columns, rows)))
        case "sixel":
            width, height = _cell()
            _write(sixels(fitted(picture, size.columns * width, rows * height)))
        case "blocks":
            small = fitted(picture, min(size.columns - 1, COLUMNS), 2 * rows)
            Console(highlight=False).print(blocks(small), end="")


def kitty(png: bytes) -> Iterator[str]:
    """The commands that show a PNG file; the terminal answers none of them (q=2)."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    for i, chunk in enumerate(chunks):
        keys = "a=T,f=100,q=2," if i == 0 else ""
        yield f"\x1b_G{keys}m={int(i + 1 < len(chunks))};{chunk}\x1b\\"


def iterm(png: bytes) -> str:
    """The command that shows a PNG file."""
    return f"\x1b]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\x07"


def blocks(picture: Picture) -> Text:
    """Upper half blocks: a character is a pixel above one below. An odd last row has black below it."""
    text = Text()
    for top in range(0, len(picture), 2):
        above = picture[top]
        below = picture[top + 1] if top + 1 < len(picture) else above * 0
        for high, low in zip(above.tolist(), below.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*high), bgcolor=Color.from_rgb(*low)))
        text.append("\n")
    return text


def fitted(picture: Picture, width: int, height: int) -> Picture:
    """A picture made smaller, as far as it does not fit into so many pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((max(1, width), max(1, height)))
    return np.array(image, np.uint8)


def _file(picture: Picture, columns: int, rows: int) -> bytes:
    """A PNG file that fits into so many characters."""
    width, height = _cell()
    return encode_image(fitted(picture, columns * width, rows * height))


def _cell() -> tuple[int, int]:
    """Width and height of a character in pixels."""
    try:
        import fcntl
        import struct
        import termios

        found = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("HHHH", found)
    except (ImportError, OSError):  # Windows, or no such request
        return CELL
    return (width // columns, height // rows) if rows and columns and width >= columns and height >= rows else CELL


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
