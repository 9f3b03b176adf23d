"""Reading regular files alone, and what the system says of files, in our words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from runtime.errors import EnginecastError, InvalidInput, NotFound, ResourceExhausted
from runtime.files import cache_folder, file_error, open_regular, read_regular


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = {"a pipe": tmp_path / "pipe", "a folder": tmp_path, "a device": Path("/dev/zero")}[kind]
    if kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match=f"it is {kind}, expected a file") as caught:
        open_regular(path)
    assert caught.value.filename == str(path)


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    regular = (tmp_path / "file").stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: regular)  # what was seen before it was exchanged
    with pytest.raises(OSError, match="it is a pipe"):
        open_regular(tmp_path / "pipe")


def test_a_limit_is_read_up_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert read_regular(tmp_path / "file", 3) == b"abc"
    with pytest.raises(OSError, match="it has more than 2 bytes"):
        read_regular(tmp_path / "file", 2)


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (errno.ENOSPC, ResourceExhausted, "Free some space"),
        (errno.EDQUOT, ResourceExhausted, "Free some space"),
        (errno.EFBIG, ResourceExhausted, "ulimit -f"),
        (errno.EMFILE, ResourceExhausted, "ulimit -n"),
        (errno.EACCES, InvalidInput, "Give this user the right"),
        (errno.EROFS, InvalidInput, "can be written"),
        (errno.ENAMETOOLONG, InvalidInput, "shorter name"),
        (errno.ELOOP, InvalidInput, "links"),
        (errno.ENOENT, NotFound, ""),
        (errno.EIO, InvalidInput, ""),
    ],
)
def test_what_the_system_says(code: int, kind: type[EnginecastError], advice: str) -> None:
    found = file_error(OSError(code, os.strerror(code), "/some/where"))
    assert type(found) is kind and f"/some/where: {os.strerror(code)}" in str(found) and advice in str(found)


def test_a_copy_names_both_and_the_cache_its_variable() -> None:
    assert "/from to /to: " in str(file_error(OSError(errno.EFBIG, "File too large", "/from", None, "/to")))
    found = file_error(OSError(errno.EACCES, "Permission denied", str(cache_folder() / "engines")))
    assert isinstance(found, ResourceExhausted) and "Set ENGINECAST_CACHE" in str(found)
    assert "standard output" in str(file_error(OSError(errno.ENOSPC, "No space left on device")))
    assert "current folder" in str(file_error(FileNotFoundError(errno.ENOENT, "No such file or directory")))


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("ENGINECAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InvalidInput, match="ENGINECAST_CACHE: is not set and this user has no home folder"):
        cache_folder()
    monkeypatch.setenv("ENGINECAST_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
