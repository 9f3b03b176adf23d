"""How a control and a style are written on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import InvalidInput
from serving.cli.drawing import Conditions, parse_control, parse_style


@pytest.mark.parametrize(
    ("text", "image", "numbers"),
    [
        ("edges=a.png", "a.png", (1, 0, 1)),
        ("edges=a.png:0.8", "a.png", (0.8, 0, 1)),
        ("edges=a.png:.5@0.2-0.7", "a.png", (0.5, 0.2, 0.7)),
        ("edges=a.png@0-0.5", "a.png", (1, 0, 0.5)),
        ("edges=C:/b=c/a@2x.png", "C:/b=c/a@2x.png", (1, 0, 1)),
    ],
)
def test_a_control(text: str, image: str, numbers: tuple[float, ...]) -> None:
    control = parse_control(text)
    assert (control.name, control.image) == ("edges", Path(image))
    assert (control.scale, control.start, control.end) == numbers


@pytest.mark.parametrize("text", ["", "a.png", "=a.png", "edges="])
def test_no_control(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"control: is .*, expected NAME=PICTURE"):
        parse_control(text)


def test_conditions() -> None:
    given = Conditions(original_size="768,1024", negative_crop_top_left="3,4", aesthetic_score=7.0)
    assert given.sizes() == {"original_size": (768, 1024), "negative_crop_top_left": (3, 4)}
    assert given.scores() == {"aesthetic_score": 7.0}
    with pytest.raises(InvalidInput, match="target_size: is '8', expected two lengths in pixels, HEIGHT,WIDTH or TOP"):
        Conditions(target_size="8").sizes()


def test_a_style() -> None:
    style, bare = parse_style("style=a.png:0.5"), parse_style("style=a.png")
    assert (style.name, style.image, style.scale, bare.scale) == ("style", Path("a.png"), 0.5, 1)
    with pytest.raises(InvalidInput, match=r"style: is 'a.png', expected NAME=PICTURE\[:SCALE\]"):
        parse_style("a.png")
