"""A build appears whole or not at all, however it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.build.staging import cache_folder, cached, key_of, staging
from runtime.bundle.manifest import MANIFEST
from runtime.errors import InvalidInput, ResourceExhausted

UNDER_WAY = """
import sys, time
from pathlib import Path
from export.build.staging import cached, staging
def make(path):
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
with staging(Path(sys.argv[1]), force=True) as folder:
    (folder / "weights").write_bytes(b"0" * 100_000)
    cached("0" * 64, ".json", make)
"""


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def fill(output: Path, content: str, force: bool = False) -> None:
    with staging(output, force) as folder:
        (folder / MANIFEST).write_text(content)
        (folder / "onnx").mkdir()


def test_the_output_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "bundle"
    with staging(output, force=False) as folder:
        (folder / MANIFEST).write_text("new")
        assert not output.exists() and folder.parent == output.parent
    assert (output / MANIFEST).read_text() == "new" and output.stat().st_mode & 0o777 == 0o755
    assert names(output.parent) == ["bundle"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="went wrong"), staging(tmp_path / "bundle", force=False) as folder:
        (folder / "weights").write_bytes(b"0" * 1000)
        raise ValueError("went wrong")
    assert not names(tmp_path)


def test_a_failure_leaves_the_earlier_bundle(tmp_path: Path) -> None:
    fill(tmp_path / "bundle", "old")
    with pytest.raises(ValueError, match="went wrong"), staging(tmp_path / "bundle", force=True):
        raise ValueError("went wrong")
    assert (tmp_path / "bundle" / MANIFEST).read_text() == "old" and names(tmp_path) == ["bundle"]


def test_another_bundle_is_replaced_only_by_force(tmp_path: Path) -> None:
    fill(tmp_path / "bundle", "old")
    with pytest.raises(InvalidInput, match="holds another bundle: choose another folder, or replace it with --force"):
        fill(tmp_path / "bundle", "new")
    fill(tmp_path / "bundle", "new", force=True)
    assert (tmp_path / "bundle" / MANIFEST).read_text() == "new" and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    (tmp_path / "letter.txt").write_text("dear")
    for name in ("photos", "letter.txt"):
        with pytest.raises(InvalidInput, match="exists and is no bundle: choose another folder"):
            fill(tmp_path / name, "new", force)
    assert (tmp_path / "photos" / "cat.png").exists() and (tmp_path / "letter.txt").exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    fill(tmp_path, "new")
    assert (tmp_path / MANIFEST).read_text() == "new"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceExhausted, match=r"cannot write beside .* is no folder"):
        fill(tmp_path / "file" / "bundle", "new")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="is full: free some space"), staging(tmp_path / "bundle", force=False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not names(tmp_path)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda end: end.name)
def test_a_killed_build_leaves_nothing(tmp_path: Path, end: signal.Signals) -> None:
    output, cache = tmp_path / "out" / "bundle", tmp_path / "cache"
    environment = os.environ | {"ENGINECAST_CACHE": str(cache)}
    with subprocess.Popen(
        [sys.executable, "-c", UNDER_WAY, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert len(names(output.parent)) == len(names(cache)) == 1
        process.send_signal(end)
        process.wait(10)
    deadline = time.monotonic() + 20
    while (names(output.parent) or names(cache)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not names(output.parent) and not names(cache)


# The cache


def test_a_step_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text('"result"')

    first, second = cached("key", ".json", make), cached("key", ".json", make)
    assert first == second == tmp_path / "cache" / "key.json" and first.read_text() == '"result"' and len(made) == 1


@pytest.mark.parametrize(
    ("suffix", "damage"), [(".json", b""), (".json", b'{"half": '), (".json", b"\x00" * 9), (".onnx", b"")]
)
def test_a_step_that_was_damaged_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str, damage: bytes
) -> None:
    """As after a loss of power, which leaves names without contents."""
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))
    cached("key", suffix, lambda path: path.write_text('"result"')).write_bytes(damage)
    assert cached("key", suffix, lambda path: path.write_text('"again"')).read_text() == '"again"'


def test_a_step_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))

    def make(path: Path) -> None:
        path.write_text("half")
        raise ValueError("went wrong")

    with pytest.raises(ValueError, match="went wrong"):
        cached("key", ".json", make)
    assert not names(tmp_path)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceExhausted, match=r"cannot write the cache .*: File exists\. Set ENGINECAST_CACHE"):
        cached("key", ".json", lambda path: None)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGINECAST_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "enginecast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "enginecast"


def test_keys_tell_facts_apart() -> None:
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1}) != key_of("a", {"x": 2, "y": 1})
    assert len({key_of("ab"), key_of("a", "b"), key_of(["a", "b"])}) == 3
