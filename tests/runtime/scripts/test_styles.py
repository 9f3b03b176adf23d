"""Styles of a styles.csv, as Automatic1111's web UI writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from enginecast import InvalidInput
from runtime.diffusion.hires import Hires
from runtime.script import Folders
from runtime.scripting import Scripts
from runtime.tasks.image import ImageRequest
from serving.dialects.python.model import Model
from tests.fakes.painting import Painter, painted

FILE = '''\ufeffname,prompt,negative_prompt
ink,"ink drawing of {prompt}, black",colour
bright,"vivid, sunny",
"quoted ""x""",{prompt}{prompt},
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "styles.csv"
    file.write_text(FILE, "utf-8")
    return file


def model_of(file: Path) -> Model:
    return Model(Painter(), installed=Scripts(Folders(styles=file)))


@pytest.mark.parametrize(
    ("names", "prompt", "negative"),
    [
        (["ink"], "ink drawing of a fox, black", "dark, colour"),
        (["bright"], "a fox, vivid, sunny", None),
        ("ink, bright", "ink drawing of a fox, black, vivid, sunny", "dark, colour"),
        (["bright", "ink"], "ink drawing of a fox, vivid, sunny, black", "dark, colour"),
        (['quoted "x"'], "a foxa fox", None),
    ],
)
def test_a_style_is_added(file: Path, names: object, prompt: str, negative: str | None) -> None:
    with model_of(file) as model:
        drawn = model.generate("a fox", negative_prompt="dark", seed=1, scripts={"styles": {"names": names}}).images[0]
    assert (drawn.prompt, drawn.negative_prompt) == (prompt, negative)
    expected = painted(ImageRequest(prompt, negative_prompt=negative or "dark", seed=1))
    np.testing.assert_array_equal(drawn.image, expected)


def test_a_style_in_several_pictures(file: Path) -> None:
    with model_of(file) as model:
        drawn = model.generate("", seed=1, images=3, scripts={"styles": {"names": ["bright"]}})
    assert [one.prompt for one in drawn.images] == ["vivid, sunny"] * 3


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        (FILE, ["inc"], r"scripts.styles.names: 'inc' is no style: did you mean 'ink'\?"),
        (FILE, [], "scripts.styles.names: List should have at least 1 item"),
        (FILE, 3, "scripts.styles.names: Input should be a valid list"),
        ("a,b\n1,2\n", ["ink"], "scripts.styles: the file of styles has no columns name, prompt, negative_prompt"),
        ('name,prompt,negative_prompt\n"a', ["ink"], "scripts.styles: the file of styles cannot be read"),
    ],
)
def test_what_is_no_style(file: Path, content: str, names: object, message: str) -> None:
    file.write_text(content, "utf-8")
    with pytest.raises(InvalidInput, match=message) as caught, model_of(file) as model:
        model.generate("a", scripts={"styles": {"names": names}})
    assert str(file.parent) not in str(caught.value)


def test_a_style_may_hold_wildcards(file: Path, tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("red\n")
    file.write_text("name,prompt,negative_prompt\nink,__colour__ ink,\n")
    scripts = Scripts(Folders(wildcards=tmp_path, styles=file))
    with Model(Painter(), installed=scripts) as model:
        drawn = model.generate("a fox", scripts={"styles": {"names": ["ink"]}, "wildcards": {}}).images[0]
    assert drawn.prompt == "a fox, red ink"


def test_a_style_reaches_the_prompts_of_a_second_pass(file: Path) -> None:
    painter, scripts = Painter(), {"styles": {"names": ["ink", "bright"]}}
    with Model(painter, installed=Scripts(Folders(styles=file))) as model:
        for hires in (Hires(prompt="a cat"), Hires(negative_prompt="day"), Hires()):
            model.generate("a fox", negative_prompt="dark", seed=1, hires=hires, scripts=scripts)
    first, second, third = (request.hires for request in painter.requests)
    assert first == Hires(prompt="ink drawing of a cat, black, vivid, sunny")
    assert second == Hires(negative_prompt="day, colour")
    assert third == Hires(), "it has the prompts of the first pass"
