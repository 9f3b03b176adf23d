"""Wildcards: which lines are drawn, that pictures can be drawn again, and what a prompt may not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import enginecast
from enginecast import InvalidInput
from enginecast.testing import fake_model
from runtime.diffusion.hires import Hires
from runtime.script import Folders
from runtime.scripting import Scripts
from runtime.tasks.image import ImageRequest
from serving.cli import commands as cli
from serving.cli.offered import host_of
from serving.dialects.python.model import Model
from serving.settings import Settings
from tests.fakes.painting import Painter, painted, painting

SCRIPTS: dict[str, Any] = {"wildcards": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "wildcards"
    (folder / "deep").mkdir(parents=True)
    (folder / "colour.txt").write_text("\ufeff# colours\nred\n\n  blue  \ngreen\n", "utf-8")
    (folder / "deep" / "thing.txt").write_text("__colour__ circle\n__colour__ box\n")
    (folder / "loop.txt").write_text("a __loop__\n")
    (folder / "twice.txt").write_text("__thrice__ __thrice__ __thrice__\n")
    (folder / "thrice.txt").write_text("__four__ __four__ __four__\n")
    (folder / "four.txt").write_text(" ".join(["__colour__"] * 200) + "\n")
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "secret.txt").write_text("secret\n")
    return folder


def model_of(folder: Path) -> Model:
    return Model(Painter(), installed=Scripts(Folders(wildcards=folder)))


def test_each_picture_draws_its_own_and_can_be_drawn_again(folder: Path) -> None:
    with model_of(folder) as model:
        many = model.generate("a __deep/thing__", negative_prompt="__colour__", seed=5, images=12, scripts=SCRIPTS)
        prompts = [one.prompt for one in many.images]
        assert [one.index for one in many.images] == list(range(12)) and [one.seed for one in many.images] == [
            *range(5, 17)
        ]
        assert set(prompts) <= {
            f"a {colour} {form}" for colour in ("red", "blue", "green") for form in ("circle", "box")
        }
        assert len(set(prompts)) > 3 and {one.negative_prompt for one in many.images} == {"red", "blue", "green"}
        for one in many.images[:3]:
            assert one.prompt is not None and one.negative_prompt is not None
            same = ImageRequest(one.prompt, negative_prompt=one.negative_prompt, seed=one.seed)
            np.testing.assert_array_equal(one.image, painted(same))
            alone = model.generate("a __deep/thing__", negative_prompt="__colour__", seed=one.seed, scripts=SCRIPTS)
            np.testing.assert_array_equal(alone.image, one.image)
        assert model.generate("a", seed=5, scripts=SCRIPTS).images[0].prompt is None
        assert model.generate("a __colour__", seed=5).images[0].prompt is None, "without the script nothing is expanded"


def test_steps_of_all_pictures_are_counted_together(folder: Path) -> None:
    with model_of(folder) as model:
        events = list(model.generate_stream("__colour__", seed=5, images=3, steps=2, scripts=SCRIPTS))
    progress = [(one.step, one.total) for one in events if isinstance(one, enginecast.Progress)]
    assert progress == [(step, 6) for step in range(1, 7)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("__color__", r"prompt: has the wildcard 'color', of which there is no file: did you mean 'colour'\?"),
        ("__../secret__", None),
        ("__deep/../../secret__", None),
        ("__/etc/passwd__", None),
        ("__secret__", "prompt: has the wildcard 'secret', of which there is no file"),
        ("__loop__", "prompt: has wildcards in wildcards, more than 10 deep"),
        ("__twice__", "prompt: needs more than 1,000 lines of wildcards"),
        ("__empty__", "prompt: has the wildcard 'empty', whose file has no lines"),
        ("__bytes__", "prompt: has the wildcard 'bytes', whose file is no UTF-8 text"),
    ],
)
def test_what_a_prompt_may_not_have(folder: Path, prompt: str, message: str | None) -> None:
    with model_of(folder) as model:
        if message is None:  # no wildcard: a name has no dots that lead elsewhere
            assert model.generate(prompt, scripts=SCRIPTS).images[0].prompt is None
        else:
            with pytest.raises(InvalidInput, match=message) as caught:
                model.generate(prompt, scripts=SCRIPTS)
            assert str(folder) not in str(caught.value)


def test_a_server_draws_from_the_folder_that_it_was_given(folder: Path, tmp_path: Path) -> None:
    with painting(tmp_path / "bundles", Scripts(Folders(wildcards=folder))) as (server, painter):
        with enginecast.Client(server.address, "draw") as client:
            drawn = client.generate("a __colour__ circle", seed=1, scripts=SCRIPTS).images[0]
        with model_of(folder) as model:
            assert model.generate("a __colour__ circle", seed=1, scripts=SCRIPTS).images[0].prompt == drawn.prompt
        command = ["generate", "--address", server.address, "--model", "draw", "--prompt", "a __colour__ circle"]
        more = ["--seed", "1", "--script", "wildcards", "--out", str(tmp_path / "a.png")]
        ended = CliRunner().invoke(cli.app, [*command, *more])
        assert f"prompt of picture 0: {drawn.prompt}" in ended.output and len(painter.requests) == 2
    with pytest.raises(InvalidInput, match=r"scripts.wildcards: needs a folder of wildcards"), fake_model() as bare:
        bare.generate("a", scripts=SCRIPTS)
    with pytest.raises(enginecast.NotFound, match="there is no folder of wildcards"):
        host_of(Settings(repository=tmp_path, wildcards=tmp_path / "none"))


def test_wildcards_of_a_second_pass_are_drawn(folder: Path) -> None:
    """The same as those of the first pass, where both have the same prompt; each picture draws its own."""
    painter, text = Painter(), "a __deep/thing__, __colour__"
    with Model(painter, installed=Scripts(Folders(wildcards=folder))) as model:
        model.generate(text, negative_prompt="__colour__", seed=5, images=4, scripts=SCRIPTS, hires=Hires(prompt=text))
        assert len({request.prompt for request in painter.requests}) > 1 and len(painter.requests) == 4
        for request in painter.requests:
            assert request.hires == Hires(prompt=request.prompt) and "__" not in request.prompt
        with pytest.raises(InvalidInput, match=r"hires\.negative_prompt: has the wildcard 'none'"):
            model.generate("a", hires=Hires(negative_prompt="__none__"), scripts=SCRIPTS)
