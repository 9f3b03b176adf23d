"""Whatever a path on the command line leads to, a command ends with one line and an exit code: no traceback, no
waiting.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from runtime.bundle.manifest import MANIFEST, SCHEMA, sha256
from runtime.command import BUG
from serving.cli import commands as cli

SAMPLES: Final = Path(__file__).parents[1] / "samples"


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
        "precision": {"weights": ["float32"]},
        "nbytes": 0,
    }
    manifest = {
        "schema_version": SCHEMA, "name": "bundle", "key": "k", "pipeline": "chat", "task": "chat", "quant": "none",
        "config": {}, "versions": {},
        "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"}, "submodels": [part],
        "artifacts": [{"target": "onnxruntime", "submodel": "part"}], "files": {"onnx/part/model.onnx": sha256(graph)},
    }  # fmt: skip
    (tmp_path / "bundle" / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


PLACES: Final = [
    "file", "empty", "folder", "pipe", "socket", "broken", "loop", "closed", "./file/below", "x" * 300, "/dev/zero",
    "\udcff\udcfe", "",
]  # fmt: skip
READS: Final = [
    "inspect {}", "verify {}", "add-target {} --target onnxruntime", "strip {}", "sign {} --key key.pem", "report {}",
    "bench {}",
    "score {}", "serve {}", "generate --prompt x --out x.png --bundle {}", "chat --prompt x --bundle {}",
    "devices --bundle {}",
    "verify bundle --signature {}", "sign bundle --key {}", "serve bundle --require-signature {}",
    "chat --bundle bundle --image {}",
    "serve bundle --config {}", "serve bundle --tls-cert {} --tls-key {}", "serve bundle --tokens {}",
    "devices --address 127.0.0.1:1 --ca {}", "devices --address 127.0.0.1:1 --cert {} --key {}",
    "build {} --output made", "calibrate {} --output made", "score --source {}",
]  # fmt: skip
WRITES: Final = [
    "generate --prompt x --bundle bundle --out {}", "keygen {}", "report bundle --output {}",
    "build missing --output {}",
    "calibrate missing --output {}", "serve bundle --audit-log {}",
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


# What small files say


def source(places: Path) -> Path:
    """A checkpoint with the sample's files, as links."""
    folder = places / "source"
    shutil.copytree(SAMPLES / "shapes-vlm", folder, copy_function=os.symlink)
    return folder


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no JSON"),
        (b"\x00" * 100, "no JSON"),
        (b"[" * 1_000_000, "no JSON"),
        (b'{"a": ' * 100_000, "no JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"architectures": "\\ud800"}', "does not say which class made it"),
        (b'{"architectures": [' + b"9" * 5000 + b"]}", "no JSON"),
    ],
)
def test_a_config_that_is_none(run: Any, places: Path, content: bytes, why: str) -> None:
    folder = source(places)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(content)
    ended = run("build", folder, "--output", "made")
    must_fail_well(ended)
    assert re.search(why, ended.err), ended.err


@pytest.mark.parametrize(
    "name", ["x" * 300, "nul\x00", "\ud800", "../model.safetensors", "/etc/passwd", "", ".", "a\nb"]
)
def test_a_shard_index_with_a_name_that_no_file_has(run: Any, places: Path, name: str) -> None:
    folder = source(places)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    ended = run("build", folder, "--output", "made")
    must_fail_well(ended)
    assert "expected a file in its own folder" in ended.err, ended.err


def header(entries: object) -> bytes:
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content


F32: Final = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no safetensors file"),
        ((1 << 63).to_bytes(8, "little"), "at most"),
        ((1 << 20).to_bytes(8, "little") + b"{", "truncated"),
        (header({"a": F32, "b": F32}) + bytes(4), "overlap"),
        (header({"a": F32 | {"data_offsets": [4, 8]}}) + bytes(8), "hole"),
        (header({"a": F32 | {"shape": [10**400] * 3}}), "expected dtype, shape and data_offsets"),
        (header({"a": F32 | {"shape": [10**12]}}), "needs 4000000000000 bytes"),
        (header({"a": F32 | {"shape": [1] * 100_000}}) + bytes(4), "expected dtype, shape and data_offsets"),
        (header({"a": F32 | {"shape": [-1]}}), "expected dtype, shape and data_offsets"),
        (header({"a": F32 | {"dtype": "F" * 10**6}}) + bytes(4), "known are"),
        (header({"a" * 10**6: F32}), "truncated"),
        (header({"a" * 10**6: F32 | {"shape": [2]}}), "needs 8 bytes"),
        (header(b"[" * 10**6), "damaged header"),
        (header(b'{"a":' * 10**5), "damaged header"),
        (header(b'{"a": 1, "a": 1}'), "damaged header"),
    ],
)
def test_a_header_that_no_file_has(run: Any, places: Path, content: bytes, why: str) -> None:
    folder = source(places)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)
    ended = run("build", folder, "--output", "made")
    must_fail_well(ended)
    assert why in ended.err and len(ended.err) < 2000, ended.err


@pytest.mark.parametrize(
    ("field", "value"), [("tokens_per_image", 10**12), ("context_length", 10**13), ("vocab_size", 2.5)]
)
def test_settings_of_a_bundle_that_no_model_has(run: Any, places: Path, field: str, value: object) -> None:
    manifest = json.loads((places / "bundle" / MANIFEST).read_bytes())
    config = {
        "context_length": 100,
        "vocab_size": 9,
        "hidden_size": 8,
        "bos_token_id": None,
        "eos_token_ids": [1],
        "image_token_id": 3,
    }
    manifest["config"] = config | {"tokens_per_image": 4, field: value}
    (places / "bundle" / MANIFEST).write_text(json.dumps(manifest))
    ended = run("chat", "--bundle", "bundle", "--prompt", "x")
    must_fail_well(ended)
    assert field in ended.err, ended.err


def test_a_name_that_cannot_be_shown(run: Any, places: Path) -> None:
    for name in ("two\nlines", "\x1b[31m", "\udcff", "\u202e", "x" * 201, " x"):
        ended = run("build", source(places), "--output", "made", "--name", name)
        must_fail_well(ended)
        assert "is no name" in ended.err and ended.err.rstrip("\n").isprintable(), ended.err
        shutil.rmtree(places / "source")
