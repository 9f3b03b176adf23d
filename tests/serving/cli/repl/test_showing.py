"""Pictures shown in a terminal."""

from __future__ import annotations

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from runtime.errors import InvalidInput
from serving.cli.repl import showing
from serving.cli.repl.sixel import sixels

RED, BLUE = (255, 0, 0), (0, 0, 255)
PICTURE = np.array([[RED, BLUE], [BLUE, RED], [RED, RED]], np.uint8)


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "COLORTERM": "truecolor"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "foot", "COLORTERM": "truecolor"}, "sixel"),
        ({"TERM": "foot", "TMUX": "x", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, "never"),
        ({"TERM": "xterm-256color"}, "never"),
        ({"TERM": "xterm-kitty", "NO_COLOR": ""}, "never"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "never"),
        ({}, "never"),
    ],
)
def test_what_a_terminal_can(environment: dict[str, str], way: str) -> None:
    assert showing.detected(environment) == way


def test_kittys_commands_hold_the_file() -> None:
    png = np.random.default_rng(0).bytes(10_000)
    commands = list(showing.kitty(png))
    found = [re.fullmatch(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", command) for command in commands]
    assert [one[1] for one in found if one] == ["a=T,f=100,q=2,m=1", "m=1", "m=1", "m=0"]
    assert base64.b64decode("".join(one[2] for one in found if one)) == png
    assert max(map(len, commands)) < 4200


def test_iterms_command_holds_the_file() -> None:
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):([A-Za-z0-9+/=]*)\x07", showing.iterm(b"12345"))
    assert found is not None and (found[1], base64.b64decode(found[2])) == ("5", b"12345")


@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (13, 40), (64, 64)])
def test_sixels_hold_the_pixels(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 3, (*shape, 3), np.uint8) * 51
    found = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)((?:#\d+;2;\d+;\d+;\d+)+)(.*)\x1b\\', sixels(picture))
    assert found is not None and (int(found[2]), int(found[1])) == shape
    colours = {int(n): [int(one) for one in rgb.split(";")] for n, rgb in re.findall(r"#(\d+);2;([\d;]+)", found[3])}
    shown = np.full((-(-shape[0] // 6) * 6, shape[1], 3), -1)
    for band, line in enumerate(found[4].split("-")):
        for number, runs in re.findall(r"#(\d+)([^$#]+)", line):
            letters = "".join(letter * int(count or 1) for count, letter in re.findall(r"(?:!(\d+))?([?-~])", runs))
            assert len(letters) == shape[1]
            for bit in range(6):
                hit = [ord(letter) - 63 >> bit & 1 == 1 for letter in letters]
                shown[6 * band + bit, hit] = colours[int(number)]
    np.testing.assert_allclose(shown[: shape[0]], picture / 255 * 100, atol=1)
    assert (shown[shape[0] :] == -1).all()


def test_blocks_are_two_pixels_each() -> None:
    file = io.StringIO()
    Console(file=file, color_system="truecolor", force_terminal=True).print(showing.blocks(PICTURE), end="")
    assert file.getvalue().split("\n") == [
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\x1b[38;2;0;0;255;48;2;255;0;0m▀\x1b[0m",
        "\x1b[38;2;255;0;0;48;2;0;0;0m▀\x1b[0m" * 2,
        "",
    ]


def test_large_pictures_are_made_smaller() -> None:
    assert showing.fitted(np.zeros((300, 600, 3), np.uint8), 60, 60).shape == (30, 60, 3)
    assert np.array_equal(showing.fitted(PICTURE, 60, 60), PICTURE)


def test_nothing_is_written_to_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    for way in ("auto", "never", "kitty", "iterm", "sixel", "blocks"):
        showing.show(PICTURE, way)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    showing.check_way("auto")
    with pytest.raises(InvalidInput, match="pictures: is kitty, and standard output is no terminal"):
        showing.check_way("kitty")


@pytest.mark.parametrize("way", ["kitty", "iterm"])
def test_what_is_shown_fits(way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "10")
    showing.show(np.zeros((400, 100, 3), np.uint8), way)  # type: ignore[arg-type]
    data = re.sub(r"\x1b_G[^;]*;|\x1b\\|\x1b\][^:]*:|\x07|\n", "", capsys.readouterr().out)
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == (28, 112), "seven lines of 16 pixels"
