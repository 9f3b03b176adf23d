"""A conversation at a terminal: the real command against a fake server, and once with a real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runtime.errors import ContextLengthExceeded
from runtime.files import DATA
from runtime.tasks.chat import ChatRequest
from tests.fakes.serving import FakeAnswers, FakeServer, until
from tests.fakes.terminal import CTRL_C, CTRL_D, ROOT, Terminal

WORD = "a red círcle"


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b c.jpg")
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ChatRequest]:
    """The requests that the model has got."""
    requests: list[ChatRequest] = []
    own = FakeAnswers.pipeline

    def pipeline(self: FakeAnswers, request: Any) -> Any:
        requests.append(request)
        if "too long" in request.messages[-1].content:
            raise ContextLengthExceeded("messages", "has 70,000 tokens, expected at most 4,096")
        return own(self, request)

    monkeypatch.setattr(FakeAnswers, "pipeline", pipeline)
    return requests


def turns(request: ChatRequest) -> list[tuple[str, list[str]]]:
    """Roles with texts; a picture is *."""
    return [(turn.role, [part if isinstance(part, str) else "*" for part in turn.content]) for turn in request.messages]


Begin = Callable[..., Terminal]


@pytest.fixture
def begin(warm: FakeServer, tmp_path: Path) -> Iterator[Begin]:
    """Begins a conversation at a terminal, in the folder of the pictures."""
    begun: list[Terminal] = []

    def begin(*arguments: str) -> Terminal:
        begun.append(Terminal("chat", "--address", warm.address, "--model", "talk", *arguments, folder=tmp_path))
        begun[-1].wait("> ")
        return begun[-1]

    yield begin
    for one in begun:
        one.__exit__(None, None, None)


def test_pictures_in_the_text(begin: Begin, seen: list[ChatRequest], data: Path) -> None:
    talk = begin()
    talk.type(f"what is on ./a.png and {data}/b c.jpg?")
    talk.wait("added a.png\nadded b c.jpg\na red círcle\n3 tokens")
    talk.type("what is on ./nowhere.png?")
    talk.wait("enginecast: './nowhere.png' names a picture, and there is no such file")
    talk.type("/set paths off", "and what is nowhere.png?", "/image a.png")
    talk.wait("3 tokens")
    talk.wait("added a.png")
    talk.type('"""two', 'lines"""')
    talk.wait("3 tokens")
    talk.wait("> ")
    talk.type(CTRL_D)
    assert talk.end() == 0
    first, second = ("user", ["what is on ", "*", " and ", "*", "?"]), ("user", ["and what is nowhere.png?"])
    answer = ("assistant", [WORD])
    assert [turns(request) for request in seen] == [
        [first],
        [first, answer, second],
        [first, answer, second, answer, ("user", ["*", "two\nlines"])],
    ], "what names no file was not sent"


def test_ctrl_c_stops_the_answer(begin: Begin, seen: list[ChatRequest], warm: FakeServer) -> None:
    model = warm.models["talk"]
    talk = begin()
    model.hold()
    talk.type("what?")
    until(lambda: model.calls == 1)
    talk.type(CTRL_C)
    talk.wait("stopped\n> ")
    until(lambda: warm.leaving("talk"))  # the server hears of it a little later
    model.release()
    until(lambda: warm.busy("talk") == 0)
    assert model.calls == 1, "the request is cancelled on the server"
    model.hold()
    talk.type("what now?")
    until(lambda: model.calls == 2)
    model.let(1)
    talk.wait("\na ")
    until(lambda: model.calls == 3)
    talk.type(CTRL_C)
    talk.wait("stopped\n> ")
    until(lambda: warm.leaving("talk"))  # the server hears of it a little later
    model.release()
    until(lambda: warm.busy("talk") == 0)
    talk.type("go on", "/show messages", "/quit")
    assert talk.end() == 0
    asked, partly = ("user", ["what now?"]), ("assistant", ["a "])
    assert turns(seen[-1]) == [asked, partly, ("user", ["go on"])], "what was said stays, a question without answer not"
    assert "assistant: a  [stopped]\nuser: go on\nassistant: a red círcle\n" in talk.text


def test_keys_at_the_prompt(begin: Begin, seen: list[ChatRequest]) -> None:
    talk = begin()
    talk.type(b"/sho\tinf\t")
    talk.wait("/show info ")
    talk.type("")
    talk.wait("quantization  none")
    talk.wait("> ")
    talk.type(b"half a li")
    talk.wait("half a li")
    talk.interrupt()
    talk.wait("\n> ")
    talk.type("what?")
    talk.wait("3 tokens")
    talk.wait("> ")
    talk.interrupt()
    talk.wait("Ctrl-C again or Ctrl-D ends.\n> ")
    talk.type(b"x")
    talk.wait("x")
    talk.interrupt()
    talk.wait("\n> ")
    talk.interrupt()
    talk.wait("Ctrl-C again or Ctrl-D ends.\n> ")
    talk.interrupt()
    assert talk.end() == 0
    assert [turns(request) for request in seen] == [[("user", ["what?"])]]


def test_settings(begin: Begin, seen: list[ChatRequest]) -> None:
    talk = begin("--max-tokens", "2")
    talk.type("/set system You are terse.", "what?")
    talk.wait("a red \n3 tokens, cut at max tokens")
    talk.type("/set max_tokens 1", "/set temperature 500", "/set temperature 0.5", "/set tmperature 1", "what?")
    talk.wait("temperature: is 500.0, expected 0 (greedy) or 0.01 to 100")
    talk.wait("did you mean 'temperature'?")
    talk.wait("a \n3 tokens, cut at max tokens")
    talk.type("/unset max_tokens", "/unset system", "/clear", "what?")
    talk.wait("3 tokens")
    talk.type("/show", "/show system", "/show info", "/show sytem", "/set", "/image", "too long", "/help", "/bye")
    assert talk.end() == 0
    system = ("system", ["You are terse."])
    assert turns(seen[0]) == [system, ("user", ["what?"])] and turns(seen[1])[0] == system
    assert turns(seen[2]) == [("user", ["what?"])]
    assert [(one.max_tokens, one.temperature) for one in seen[:3]] == [(2, None), (1, 0.5), (None, 0.5)]
    squeezed = " ".join(talk.text.split())
    for shown in (
        "temperature 0.5 0 = always the likeliest token.",
        "no system message: /set system TEXT",
        "model talk server 127.0.0.1:",
        " state ready quantization none engine fake device none ",
        "/show: knows no 'sytem': did you mean 'system'?",
        "/set: needs NAME VALUE",
        "/image: needs the PATH of a picture",
        "expected at most 4,096. /clear forgets the conversation; /set context_overflow slide, or --context-overflow",
        "/load FILE go on with",
    ):
        assert shown in squeezed, shown


def test_a_conversation_is_saved_and_loaded(begin: Begin, seen: list[ChatRequest], data: Path) -> None:
    talk = begin()
    talk.type("/set system Be terse.", "./a.png what?")
    talk.wait("3 tokens")
    (data / "other").write_text("mine")
    talk.type("/save talk.json", "/save other", "/save /nowhere/x.json", "/quit")
    assert talk.end() == 0
    assert "saved 2 messages in talk.json" in talk.text
    assert "other: is no saved conversation" in talk.text and "/nowhere/.x.json.part: No such file" in talk.text
    assert len(json.loads((data / "talk.json").read_bytes())["messages"]) == 3
    again = begin()
    again.type("/load other", "/load talk.json")
    again.wait("loaded 2 messages")
    again.type("and now?")
    again.wait("3 tokens")
    again.type("/quit")
    assert again.end() == 0
    said = [("system", ["Be terse."]), ("user", ["*", "what?"]), ("assistant", [WORD])]
    assert turns(seen[-1]) == [*said, ("user", ["and now?"])]


def test_lines_are_remembered(begin: Begin, seen: list[ChatRequest], data: Path) -> None:
    talk = begin()
    talk.type("what is it?", "/set history off", "a secret")
    for _ in range(2):
        talk.wait("3 tokens")
    talk.type("/quit")
    assert talk.end() == 0
    (file,) = (data / "data" / "history").iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["what is it?", "/set history off"]
    assert file.stat().st_mode & 0o777 == 0o600
    again = begin()
    up = b"\x1b[A"
    again.type(up, up)
    again.wait("what is it?")
    again.type("")
    again.wait("3 tokens")
    again.wait("> ")
    again.type(CTRL_D)
    assert again.end() == 0 and turns(seen[-1]) == [("user", ["what is it?"])]


def test_nothing_that_controls_a_terminal_comes_from_a_model(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, seen: list[ChatRequest]
) -> None:
    monkeypatch.setattr("enginecast.testing.server.WORDS", ("\x1b]0;evil\x07", "red\u200d", "\u3000 x\n"))
    talk = begin()
    talk.type("what?")
    talk.wait("?]0;evil?red\u200d\u3000 x\n")
    assert b"\x1b]0;" not in talk.raw


@pytest.mark.skipif(find_spec("torch") is None, reason="the sample is built with torch")
def test_a_picture_in_the_text_is_answered_as_one_that_is_an_option(vlm_bundle: Path, tmp_path: Path) -> None:
    """By the sample model."""
    picture = ROOT / "docs" / "demo.png"
    where = ("chat", "--bundle", str(vlm_bundle), "--target", "onnxruntime", "--max-tokens", "24")
    question = "What is in the picture?"
    command = [sys.executable, "-m", "serving.cli.commands", *where, "--image", str(picture), "--prompt", question]
    asked = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ)
    with Terminal(*where) as talk:
        talk.wait("> ", 60)
        talk.type(f"{picture} {question}")
        talk.wait("added demo.png\n")
        talk.wait(asked.stdout, 60)
        talk.wait(" tokens")
        talk.type("/quit")
        assert talk.end() == 0 and asked.stdout.strip()
