"""Whatever a path on the command line leads to, a command ends with one line and an exit code: no traceback, no waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from runtime.bundle import MANIFEST, SCHEMA, sha256
from runtime.command import BUG
from serving import cli


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run `enginecast` in process."""
    previous = signal.getsignal(signal.SIGTERM)

    def command(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["enginecast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ended(int(caught.value.code or 0), *capfd.readouterr())

    yield command
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of each kind of thing that a path may lead to, and a bundle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"\x00\xff garbage")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "closed").mkdir(mode=0o000)
    graph = tmp_path / "bundle" / "onnx" / "part" / "model.onnx"
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"")
    part = {
        "name": "part",
        "signature": {"inputs": [], "outputs": []},
        "graph": "onnx/part/model.onnx",
        "precision": "float32",
        "nbytes": 0,
    }
    manifest = {
        "schema_version": SCHEMA, "name": "bundle", "key": "k", "pipeline": "chat", "quant": "none", "config": {}, "versions": {},
        "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"}, "submodels": [part],
        "artifacts": [{"target": "onnxruntime", "submodel": "part"}], "files": {"onnx/part/model.onnx": sha256(graph)},
    }  # fmt: skip
    (tmp_path / "bundle" / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


PLACES: Final = [
    "file", "empty", "folder", "pipe", "socket", "broken", "loop", "closed", "./file/below", "x" * 300, "/dev/zero", "\udcff\udcfe", "",
]  # fmt: skip
READS: Final = [
    "inspect {}", "verify {}", "add-target {} --target onnxruntime", "strip {}", "sign {} --key key.pem", "report {}", "bench {}",
    "score {}", "serve {}", "generate --prompt x --out x.png --bundle {}", "chat --prompt x --bundle {}", "devices --bundle {}",
    "verify bundle --signature {}", "sign bundle --key {}", "serve bundle --require-signature {}", "chat --bundle bundle --image {}",
    "build {} --output made", "calibrate {} --output made", "score --source {}",
]  # fmt: skip
WRITES: Final = [
    "generate --prompt x --bundle bundle --out {}", "keygen {}", "report bundle --output {}", "build missing --output {}",
    "calibrate missing --output {}",
]  # fmt: skip


def arguments(command: str, place: str) -> list[str]:
    return [place if word == "{}" else word for word in command.split()]


def must_fail_well(ended: Ended) -> None:
    assert ended.code not in (0, BUG), ended
    assert "Traceback" not in ended.err and "bug" not in ended.err, ended.err
    assert ended.err.strip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", READS + WRITES)
def test_a_path_that_leads_to_nothing_useful(run: Any, places: Path, command: str) -> None:
    for place in PLACES:
        if command == "keygen {}" and place in ("folder", "\udcff\udcfe"):
            continue  # keys may lie there
        must_fail_well(run(*arguments(command, place)))
