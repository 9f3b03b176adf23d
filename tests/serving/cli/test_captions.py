"""`enginecast caption DIR --output FILE`: every picture once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from runtime.errors import ContextLengthExceeded, EngineError
from serving.cli import commands as cli
from serving.host.offers import Limits
from tests.fakes.serving import FakeAnswers, FakeServer, until

ROOT = Path(__file__).parents[3]
CAPTION = "a red círcle"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "served").mkdir()
    with FakeServer(tmp_path / "served", Limits(slots=1, max_queue=8), ready=True) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures, two of them in a folder of the folder, and what is no picture."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in (*(f"{i:02}.png" for i in range(10)), "deep/a.JPG", "deep/ü b.webp", ".hidden.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(server: FakeServer, *arguments: object) -> Any:
    where = ["caption", "--address", server.address, "--model", "talk"]
    return CliRunner().invoke(cli.app, [*where, *map(str, arguments)])


def lines(file: Path) -> list[dict[str, Any]]:
    content = file.read_text("utf-8")
    assert not content or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def test_a_folder_into_a_file(server: FakeServer, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    ended = run(server, folder, "--output", out)
    assert ended.exit_code == 0 and f"10 pictures in {out}" in ended.output
    assert lines(out) == [{"image": f"{i:02}.png", "caption": CAPTION} for i in range(10)]
    ended = run(server, folder, "--output", out, "--recursive")
    assert f"12 pictures in {out}, 10 of them before" in ended.output
    assert [line["image"] for line in lines(out)[10:]] == ["deep/a.JPG", "deep/ü b.webp"]
    calls = server.models["talk"].calls
    before = out.read_bytes()
    assert run(server, folder, "--output", out, "--recursive").exit_code == 0
    assert out.read_bytes() == before and server.models["talk"].calls == calls
    one = tmp_path / "one.jsonl"
    assert run(server, folder / "00.png", "--output", one, "--answers", "2", "--temperature", "1").exit_code == 0
    assert lines(one) == [{"image": str(folder / "00.png"), "caption": CAPTION, "captions": [CAPTION, CAPTION]}]


def test_killed_and_run_again_each_picture_is_there_once(server: FakeServer, folder: Path, tmp_path: Path) -> None:
    out, talk = tmp_path / "captions.jsonl", server.models["talk"]
    talk.hold()
    command = [sys.executable, "-m", "serving.cli.commands", "caption", str(folder), "--output", str(out)]
    process = subprocess.Popen(
        [*command, "--address", server.address, "--model", "talk"], cwd=ROOT, stderr=subprocess.PIPE
    )
    talk.let(5 * 3 + 1)  # five captions of three words, and a word of the sixth; the server chooses their order
    until(lambda: talk.calls == 5 * 3 + 2 and out.read_bytes().count(b"\n") > 0, 30)
    assert "is being written by another process" in str(run(server, folder, "--output", out).exception)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = out.read_bytes()
    out.write_bytes(done + b'{"image": "03.png", "capt')  # as if it had been killed while writing
    until(lambda: all(run.job.stopped_by is not None for run in server.host.catalog.find("talk").runs))
    talk.release()
    assert run(server, folder, "--output", out).exit_code == 0
    assert out.read_bytes().startswith(done)
    assert [line["image"] for line in lines(out)] == [f"{i:02}.png" for i in range(10)]
    assert all(line["caption"] == CAPTION for line in lines(out))


def test_errors_of_single_pictures_are_recorded(
    server: FakeServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "captions.jsonl"
    (folder / "03.png").write_bytes(b"torn")
    Image.new("RGB", (9, 9)).save(folder / "05.png")
    own = FakeAnswers.pipeline

    def pipeline(self: FakeAnswers, request: Any) -> Any:
        if request.images[0].size == (9, 9):
            raise ContextLengthExceeded("messages", "are too long")
        return own(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(FakeAnswers, "pipeline", pipeline)
        ended = run(server, folder, "--output", out)
    assert ended.exit_code == 1 and "2 with an error (--retry-errors tries them again)" in ended.output
    found = {line["image"]: line for line in lines(out)}
    assert len(found) == len(lines(out)) == 10
    assert found["05.png"] == {"image": "05.png", "error": "are too long"} and "error" in found["03.png"]
    assert "03.png: " in ended.output and "05.png: messages: are too long" in ended.output
    before = out.read_bytes()
    assert run(server, folder, "--output", out).exit_code == 1 and out.read_bytes() == before
    Image.new("RGB", (8, 8)).save(folder / "03.png")
    ended = run(server, folder, "--output", out, "--retry-errors")
    assert ended.exit_code == 0 and "10 pictures in" in ended.output and "8 of them before" in ended.output
    assert sorted(line["image"] for line in lines(out)) == [f"{i:02}.png" for i in range(10)]
    assert all(line["caption"] == CAPTION for line in lines(out))


def test_other_errors_end_the_work(server: FakeServer, folder: Path, tmp_path: Path) -> None:
    out, talk = tmp_path / "captions.jsonl", server.models["talk"]
    talk.failure = EngineError("the device is lost")
    assert "the device is lost" in str(run(server, folder, "--output", out).exception)
    assert lines(out) == []
    talk.failure = None
    until(lambda: server.busy("talk") == 0)
    for wrong, message in (
        (("--beams", "0"), "beams: is 0"),
        (("--script", "none"), "scripts: 'none' is not installed"),
    ):
        assert message in str(run(server, folder, "--output", out, *wrong).exception) and lines(out) == []
    drawing = ["caption", "--address", server.address, "--model", "draw", str(folder), "--output", str(out)]
    assert "model: draw has the task image" in str(CliRunner().invoke(cli.app, drawing).exception) and lines(out) == []


@pytest.mark.parametrize(
    "content", ["no json\n", '{"a": 1}\n', '{"image": "a"}\n', "[1]\n", '{"image": 1, "caption": ""}\n']
)
def test_another_file_is_left_as_it_is(server: FakeServer, folder: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "captions.jsonl"
    out.write_text(f'{{"image": "a.png", "caption": "b"}}\n{content}rest')
    ended = run(server, folder, "--output", out)
    assert f"output: line 2 of {out} is no caption" in str(ended.exception) and out.read_text().endswith(
        f"{content}rest"
    )


def test_what_is_refused_before_any_work(server: FakeServer, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    for arguments, message in (
        ((folder,), "is a folder: give --output FILE"),
        ((folder / "00.png", "--recursive"), "recursive: belongs to --output"),
        ((folder / "00.png", "--retry-errors"), "retry_errors: belongs to --output"),
        ((folder / "none", "--output", out), "does not exist: name pictures, or folders of them"),
        ((folder, folder, "--output", out), "would both be called '00.png'"),
    ):
        assert message in str(run(server, *arguments).exception)
    with FileLock(tmp_path / ".captions.jsonl.lock"):
        assert "being written by another process" in str(run(server, folder, "--output", out).exception)
    assert not out.exists() and server.models["talk"].calls == 0


def test_a_name_that_is_no_utf8(server: FakeServer, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "captions.jsonl"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(folder / os.fsdecode(b"\xff.png"))
    for _ in range(2):
        assert run(server, folder, "--output", out).exit_code == 0
        assert lines(out) == [{"image": "\udcff.png", "caption": CAPTION}]
