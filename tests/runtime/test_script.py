"""Scripts: their hooks in every way in, their arguments, and what becomes of their mistakes."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import enginecast
from enginecast import EngineError, EngineUse, InvalidInput, ScriptError
from enginecast.testing import FakeAnswers, FakeModel, fake_model
from runtime.errors import Unauthenticated
from runtime.language.text import Message
from runtime.script import Folders
from runtime.scripting import Scripts
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from serving.cli import commands as cli
from serving.cli.scripting import parse_scripts
from serving.dialects.grpc.messages import scripts, scripts_message
from serving.enginecast_pb import common_pb2, image_pb2
from tests.fakes.painting import painted, painting
from tests.fakes.scripts import CLOSED, OWN, package
from tests.fakes.serving import FakeServer, request, until

ROOT = Path(__file__).parents[2]
MARKED = {"marks": {"word": "x", "times": 2}}


@pytest.fixture(autouse=True)
def own(tmp_path: Path) -> Iterator[None]:
    with package(tmp_path / "packages"):
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "bundles").mkdir()
    with FakeServer(tmp_path / "bundles", ready=True) as server:
        yield server


def test_hooks_before_during_and_after(tmp_path: Path) -> None:
    with painting(tmp_path / "bundles") as (server, painter):
        marked = painted(ImageRequest("xx a circle", seed=3))
        with enginecast.Client(server.address, "draw") as client:
            drawn = client.generate("a circle", seed=3, scripts=MARKED)
            np.testing.assert_array_equal(drawn.image, marked)
            assert drawn.done.notes == ("marked with x",)
        with fake_model(painter) as model:
            drawn = model.generate("a circle", seed=3, scripts=MARKED)
            np.testing.assert_array_equal(drawn.image, marked)
            assert drawn.done.notes == ("marked with x",) and isinstance(drawn.done.engines[0], EngineUse)


def test_scripts_of_answers(server: FakeServer) -> None:
    with enginecast.Client(server.address, "talk") as client:
        assert client.chat("what?", scripts={"marks": {"word": "!"}}).text == "!a !red !círcle"
        client.scripts = {"marks": {"word": "?"}}
        assert client.chat("what?").text == "?a ?red ?círcle"
        assert client.chat("what?", scripts={"marks": {"word": "!"}}).text == "!a !red !círcle"
    with fake_model(FakeAnswers()) as model:
        assert model.chat("what?", scripts={"marks": {"word": "!", "times": "2"}}).text == "!!a !!red !!círcle"


def test_the_first_script_is_the_outermost() -> None:
    grid: dict[str, Any] = {"x": {"field": "prompt", "values": ["a", "b"]}}
    with fake_model() as model:
        inside = list(model.generate_stream("c", steps=1, scripts={"xyz_grid": grid, "marks": {"word": "x"}}))
        outside = list(model.generate_stream("c", steps=1, scripts={"marks": {"word": "x"}, "xyz_grid": grid}))
    marks = [note.count("marked") for events in (inside, outside) for note in events[-1].notes if "marked" in note]  # type: ignore[attr-defined]
    assert len(marks) == 2 + 1, "inside the grid each cell is marked, outside of it the whole request"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mark": {}}, r"scripts: 'mark' is not installed here: did you mean 'marks'\?"),
        ({"../marks": {}}, r"scripts: '../marks' is not installed here"),
        ({"x" * 65: {}}, "scripts: has 65 characters"),
        ({"marks": {"wrd": "x"}}, r"scripts.marks: has no argument 'wrd': did you mean 'word'\?"),
        ({"watches": {"x": 1}}, "scripts.watches: has no argument 'x': it has none"),
        ({"marks": {}}, "scripts.marks.word: Field required"),
        ({"marks": {"word": "x", "times": "many"}}, "scripts.marks.times: Input should be a valid integer"),
        ({"marks": {"word": "x" * 100_001}}, "scripts.marks: has 100,0.. characters of JSON, expected at most 100,000"),
        ({f"s{i}": {} for i in range(9)}, "scripts: has 9 scripts of a request, expected at most 8"),
        ({"marks": "word"}, "scripts.marks: is 'word', expected arguments by name"),
    ],
)
def test_unknown_scripts_and_arguments_are_refused(server: FakeServer, given: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message), fake_model() as model:
        model.generate("a", scripts=given)
    if given != {"marks": "word"}:
        with pytest.raises(InvalidInput, match=message), enginecast.Client(server.address, "draw") as client:
            client.generate("a", scripts=given)


def test_a_script_of_another_task_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"scripts.xyz_grid: is for requests of the task image, not chat"):
        Scripts().open(_never, ChatRequest((Message("user", ("a",)),), scripts={"xyz_grid": {}}))


def _never(request: Any) -> Any:
    raise AssertionError("it is refused before")


@pytest.mark.parametrize("where", ["before", "during", "after", "request", "event"])
def test_a_mistake_in_a_script_names_it(server: FakeServer, where: str) -> None:
    with enginecast.Client(server.address, "draw") as client:
        with pytest.raises(ScriptError, match=r"script 'fails' (failed|made)") as caught:
            client.generate("a", scripts={"marks": {"word": "x"}, "fails": {"where": where}})
        assert "Traceback" not in str(caught.value) and "marks" not in str(caught.value)
        assert ("KeyError" in str(caught.value)) == (where in ("before", "during", "after"))
        assert len(client.generate("a").images) == 1, "the model serves on"


def test_errors_of_the_model_pass_as_they_are(server: FakeServer) -> None:
    given = {"marks": {"word": "x"}, "watches": {}}
    with enginecast.Client(server.address, "draw") as client:
        with pytest.raises(InvalidInput, match=r"^prompt: has"):
            client.generate("a" * 9_999, scripts=given)
        server.draw.failure = EngineError("lost")
        with pytest.raises(EngineError, match="lost"):
            client.generate("a", scripts=given)
    fake = FakeModel()
    fake.failure = KeyError("of the engine")
    with pytest.raises(KeyError, match="of the engine"), fake_model(fake) as model:
        model.generate("a", scripts=given)


def test_a_request_that_is_stopped_closes_its_scripts(server: FakeServer) -> None:
    CLOSED.clear()
    server.draw.hold()
    message = request(scripts=scripts_message({"watches": {}}))
    stream = server.client.generate(message)
    next(stream)
    assert server.draw.entered.acquire(timeout=10)
    stream.close()
    until(server.leaving)
    server.draw.let(1)
    until(lambda: CLOSED == ["watches"] and server.busy() == 0)
    assert server.alive()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"gone": "no_such_module:Script"}, "script 'gone' cannot be imported .*uninstall the package fake-broken"),
        ({"seven": "tests.fakes.scripts:NO_SCRIPT"}, "script 'seven' is no subclass of Script"),
    ],
)
def test_a_script_that_cannot_be_used(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    (name,) = entries
    with package(tmp_path / "broken", entries):
        with pytest.raises(ScriptError, match=message), fake_model() as model:
            model.generate("a", scripts={name: {}})
        listed = {one.name: one for one in Scripts().listed()}
        assert name in listed[name].error and not listed["xyz_grid"].error
        with pytest.raises(ScriptError, match=message):
            Scripts().loaded(FakeModel())  # type: ignore[arg-type]


def test_two_scripts_of_one_name_are_refused(tmp_path: Path) -> None:
    with (
        package(tmp_path / "again", {"wildcards": OWN["marks"]}),
        pytest.raises(ScriptError, match="two scripts 'wild"),
    ):
        Scripts().listed()


def test_the_list_of_scripts(server: FakeServer) -> None:
    with enginecast.Client(server.address) as client:
        found = {one.name: one for one in client.installed_scripts()}
    assert list(found) == sorted([*OWN, "styles", "wildcards", "xyz_grid"])
    assert found["marks"].summary == "Mark what comes." and '"word"' in found["marks"].arguments_schema
    assert list(found["xyz_grid"].tasks) == ["image"] and not list(found["marks"].tasks)
    here = CliRunner().invoke(cli.app, ["scripts"]).output
    assert CliRunner().invoke(cli.app, ["scripts", "--address", server.address]).output == here
    assert "marks: Mark what comes.\n    word\n    times (optional)\n" in here


def test_notes_when_a_model_is_loaded() -> None:
    assert Scripts().loaded(FakeModel()) == ["image can be marked"]  # type: ignore[arg-type]


def test_messages() -> None:
    given = {"b": {"x": [1, 2.5], "y": {"z": "ü"}}, "a": {}}
    message = image_pb2.GenerateRequest(scripts=scripts_message(given))
    assert scripts(message) == given and list(scripts(message)) == ["b", "a"]
    for arguments, why in (
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
        ('{"a": NaN}', "no JSON"),
        ("[" * 9_999, "no JSON"),
    ):
        one = common_pb2.Script(name="a", arguments=arguments)
        with pytest.raises(InvalidInput, match=f"scripts.a: has arguments that are {why}"):
            scripts(image_pb2.GenerateRequest(scripts=[one]))
    twice = [common_pb2.Script(name="a"), common_pb2.Script(name="a")]
    with pytest.raises(InvalidInput, match="scripts: names 'a' twice"):
        scripts(image_pb2.GenerateRequest(scripts=twice))
    with pytest.raises(InvalidInput, match="scripts: have arguments that are no JSON"):
        scripts_message({"a": {"b": Unauthenticated("x")}})


def test_scripts_on_the_command_line(server: FakeServer, tmp_path: Path) -> None:
    texts = ["xyz_grid:x=steps=1,2", 'xyz_grid:y={"field": "seed", "values": [1]}', "marks:word=a:b=c", "watches"]
    assert parse_scripts(texts) == {
        "xyz_grid": {"x": "steps=1,2", "y": {"field": "seed", "values": [1]}}, "marks": {"word": "a:b=c"}, "watches": {}
    }  # fmt: skip
    for wrong in ("", ":a=b", "a:b", "a:=b", "a:b=[1"):
        with pytest.raises(InvalidInput, match="script: "):
            parse_scripts([wrong])
    with pytest.raises(InvalidInput, match="gives 'a' the argument 'b' twice"):
        parse_scripts(["a:b=1", "a:b=2"])
    command = ["chat", "--address", server.address, "--model", "talk", "--prompt", "what?", "--script", "marks:word=!"]
    ended = CliRunner().invoke(cli.app, command)
    assert ended.output.startswith("!a !red !círcle\n") and "note: marked with !" in ended.output
    refused = CliRunner().invoke(cli.app, [*command, "--wildcards", str(tmp_path)])
    assert "wildcards: belongs to --bundle" in str(refused.exception)


def test_the_example_package(tmp_path: Path) -> None:
    about = tomllib.loads((ROOT / "examples" / "script" / "pyproject.toml").read_text())
    entries = about["project"]["entry-points"]["enginecast.scripts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "script")
        with package(tmp_path / "example", entries), fake_model() as model:
            events = list(
                model.generate_stream("a", preview_every=1, scripts={"signature": {"text": "me", "height": 8}})
            )
            plain = model.generate("a").image
            with pytest.raises(InvalidInput, match=r"scripts.signature: signs finished pictures"):
                model.generate("a", denoising_end=0.5, scripts={"signature": {"text": "me"}})
            assert Scripts().loaded(FakeModel()) == ["image can be marked", "pictures can be signed"]  # type: ignore[arg-type]
    (signed,) = [event.image for event in events if isinstance(event, enginecast.ImageReady)]
    assert signed.shape == plain.shape and (signed != plain).any()
    assert all(event.preview is None for event in events if isinstance(event, enginecast.Progress))
    assert events[-1].notes == ("signed by me",)  # type: ignore[attr-defined]


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    for folders, message in (
        (Folders(wildcards=tmp_path / "x"), "folder of wildcards"),
        (Folders(styles=tmp_path), "file of styles"),
    ):
        with pytest.raises(enginecast.NotFound, match=f"there is no {message} .*: check --"):
            Scripts(folders)
