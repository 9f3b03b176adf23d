"""`enginecast run`: whatever a name means, asked once or line by line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import enginecast
from runtime.bundle.manifest import MANIFEST
from runtime.files import DATA
from runtime.tasks.embed import EmbedRequest
from serving.cli import commands as cli
from serving.cli.options import ModelOptions
from serving.cli.repl.opening import found
from tests.fakes.serving import FakeAnswers, FakeServer, bundle, until
from tests.fakes.terminal import CTRL_C, CTRL_D, Terminal

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a picture."""
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Image.new("RGB", (8, 8)).save("a.png")
    return work


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The parts of the questions that the chat model has got; a picture is *."""
    questions: list[list[str]] = []
    own = FakeAnswers.pipeline

    def pipeline(self: FakeAnswers, request: Any) -> Any:
        questions.append([part if isinstance(part, str) else "*" for part in request.messages[-1].content])
        return own(self, request)

    monkeypatch.setattr(FakeAnswers, "pipeline", pipeline)
    return questions


@pytest.fixture
def run(warm: FakeServer) -> Run:
    """Runs the command where standard input is a pipe."""

    def run(*arguments: str, piped: str | bytes = "") -> Result:
        return CliRunner().invoke(cli.app, ["run", *arguments, "--address", warm.address], input=piped)

    return run


def test_one_question(run: Run, asked: list[list[str]]) -> None:
    ended = run("talk", "what", "is on ./a.png?")
    assert (ended.exit_code, ended.stdout) == (0, "a red círcle\n"), ended.output
    assert "added a.png\n" in ended.stderr and asked == [["what is on ", "*", "?"]]
    assert run("talk", "what?", "--set", "max_tokens=1", "--set", "temperature=0.5").stdout == "a \n"


def test_what_is_piped_is_added(run: Run, asked: list[list[str]]) -> None:
    """It is text, whatever files it names."""
    assert run("talk", "in a word:", piped="see ./a.png\nand ./b.png\n").stdout == "a red círcle\n"
    assert run("talk", piped="what?\n/quit\n").exit_code == 0
    assert run("talk", "what is it? ./a.png", piped="a text").exit_code == 0
    assert asked == [["in a word:\n\nsee ./a.png\nand ./b.png"], ["what?\n/quit"], ["what is it?", "*", "a text"]]


@pytest.mark.parametrize(
    ("arguments", "piped", "message"),
    [
        (("talk",), "", "prompt: is missing, and nothing is piped in"),
        (("talk",), b"\xff\xfe", "standard input: is no valid UTF-8 text"),
        (("talk",), "x" * 100_001, "standard input: has more than 100,000 characters"),
        (("talk", "what?", "--set", "steps=3"), "", "/set: knows no 'steps': did you mean 'stop'?"),
        (("talk", "what?", "--set", "seed"), "", "--set: is 'seed', expected NAME=VALUE"),
        (("talk", "what?", "--set", "temperature=500"), "", "temperature: is 500.0, expected"),
        (("talk", "what?", "--pictures", "kitty"), "", "pictures: is kitty, and standard output is no terminal"),
        (("talk", "./nowhere.png"), "", "'./nowhere.png' names a picture, and there is no such file"),
        (("tolk", "what?"), "", "did you mean 'talk'?"),
        (("draw", ""), "", "prompt: is empty: say what to draw"),
        (("draw", "a fox", "--set", "steps=0"), "", "steps: is 0, expected 1 to 1000"),
        (("draw", "a fox", "--set", "folder=/nowhere"), "", "folder /nowhere does not exist"),
        (("./somewhere", "what?"), "", "address: is that of a server, and somewhere a folder"),
        (("talk", "what?", "--target", "openvino"), "", "target: belongs to --bundle"),
        (("", "what?"), "", "NAME: is empty"),
    ],
)
def test_mistakes(run: Run, folder: Path, arguments: tuple[str, ...], piped: Any, message: str) -> None:
    ended = run(*arguments, piped=piped)
    assert message in str(ended.exception) and not ended.stdout
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_no_server(folder: Path) -> None:
    ended = CliRunner().invoke(cli.app, ["run", "mine", "what?"], env={"ENGINECAST_TLS": "1"})
    assert "To run a bundle without a server, name its folder or its --repository" in str(ended.exception)


def test_a_model_without_lines_names_its_command(folder: Path) -> None:
    bundle(folder, "match", EmbedRequest.task)
    for name in ("match", "./match", str(folder / "match")):
        ended = CliRunner().invoke(cli.app, ["run", name, "a fox"])
        assert "has the task embed, which takes no lines: use `enginecast embed`" in str(ended.exception)


def test_pictures_are_saved_under_new_names(run: Run, folder: Path) -> None:
    (folder / "draw-0007.png").write_text("mine")
    ended = run("draw", "a", "fox", "--set", "seed=5", "--set", "steps=2")
    assert (ended.exit_code, ended.stdout) == (0, "draw-0008.png\n"), ended.output
    assert re.search(r"^seed 5, \d\.\d s on fake$", ended.stderr, re.MULTILINE)
    with Image.open("draw-0008.png") as picture:
        assert picture.info["parameters"] == "a fox\nSteps: 2, Seed: 5, Size: 16x8" and picture.size == (16, 8)
    (folder / "out").mkdir()
    ended = run("draw", piped="/set images 2\n/set folder out\na fox\n\na dog\n")
    names = [f"out/draw-000{number}.png" for number in (1, 2, 3, 4)]
    assert ended.stdout.split() == names and all(Path(name).stat().st_size for name in names)
    assert (folder / "draw-0007.png").read_text() == "mine" and len(list((folder / "out").iterdir())) == 4


def test_a_name_of_a_folder_or_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2", "10"):
        bundle(folder / "all" / "mine", version)
    bundle(folder / "all", "other")
    bundle(folder, "a=b")
    where, store = ModelOptions(), folder / "all"
    assert found("mine", where, store).bundle == str(store / "mine" / "10")
    assert found("mine@2", where, store).bundle == str(store / "mine" / "2")
    assert found("other", where, store).bundle == str(store / "other")
    assert found("a=b", where, None).bundle == str(folder / "a=b")
    assert found("all/other", where, None).bundle == str(store / "other")
    assert found("mine", where, None) == ModelOptions(model="mine")
    assert found("a=b", ModelOptions(address="x:1"), None) == ModelOptions(model="a=b", address="x:1")
    ended = CliRunner().invoke(cli.app, ["run", "othr", "--repository", str(store)])
    assert "has no bundle 'othr': did you mean 'other'?" in str(ended.exception)
    shutil.rmtree(folder / "a=b")
    assert json.loads((store / "other" / MANIFEST).read_bytes())["name"] == "other"


@pytest.fixture
def draw(warm: FakeServer, folder: Path) -> Iterator[Callable[..., Terminal]]:
    """Begins to draw at a terminal."""
    begun: list[Terminal] = []

    def draw(**environment: str) -> Terminal:
        begun.append(Terminal("run", "draw", "--address", warm.address, environment=environment, folder=folder))
        begun[-1].wait("Draw with draw. /help lists commands, Ctrl-D ends.\n> ")
        return begun[-1]

    yield draw
    for one in begun:
        one.__exit__(None, None, None)


def test_drawing_at_a_terminal(draw: Callable[..., Terminal], warm: FakeServer, folder: Path) -> None:
    at = draw(TERM="xterm-kitty")
    at.type("/set seed 3", "/set steps 2", "/set wdth 8", "/clear", "a fox in ./a.png")
    at.wait("/set: knows no 'wdth': did you mean 'width'?")
    at.wait("/clear: is no command")
    at.wait("seed 3, ")
    at.wait("draw-0001.png\n")
    at.wait("> ")
    assert at.raw.count(b"\x1b_Ga=T,f=100,q=2,m=0;iVBORw0K") == 1
    warm.draw.hold()
    at.type("/set pictures never", "a dog")
    until(lambda: warm.draw.calls == 3)
    at.type(CTRL_C)
    at.wait("stopped\n> ")
    warm.draw.release()
    until(lambda: warm.busy("draw") == 0)
    at.type("a cat")
    at.wait("draw-0002.png\n")
    at.wait("> ")
    at.type(CTRL_D)
    assert at.end() == 0 and at.raw.count(b"\x1b_G") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "draw-0001.png", "draw-0002.png"]


def test_pictures_of_a_conversation_are_shown(warm: FakeServer, folder: Path) -> None:
    with Terminal(
        "run", "talk", "what is on a.png?", "--address", warm.address, environment={"COLORTERM": "truecolor"},
        folder=folder,
    ) as at:  # fmt: skip
        assert at.end() == 0
    assert at.text.startswith(f"added a.png\n{('▀' * 8 + chr(10)) * 4}a red círcle\n3 tokens")


@pytest.mark.skipif(find_spec("torch") is None, reason="the sample is built with torch")
def test_a_real_model_draws_what_the_python_api_draws(diffusion_bundle: Path, folder: Path) -> None:
    where = [str(diffusion_bundle), "--target", "onnxruntime", "--set", "steps=2", "--set", "seed=1"]
    ended = CliRunner().invoke(cli.app, ["run", *where, "a", "red", "circle"])
    assert ended.exit_code == 0, ended.output
    with Image.open(ended.stdout.strip()) as file, enginecast.load(diffusion_bundle, target="onnxruntime") as model:
        assert file.info["parameters"].startswith("a red circle\nSteps: 2, Seed: 1, Size: ")
        np.testing.assert_array_equal(np.asarray(file), model.generate("a red circle", steps=2, seed=1).image)
