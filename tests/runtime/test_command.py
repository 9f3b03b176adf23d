"""How commands end: one line and a code for what the user or the machine did, a traceback for what we did."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.command import BROKEN_PIPE, BUG, INTERRUPTED, run
from runtime.errors import InvalidInput

ROOT = Path(__file__).parents[2]


def raises(error: BaseException) -> Callable[[], None]:
    def app() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InvalidInput("steps", "is\n0"), 2, "enginecast: steps: is 0"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            9,
            "enginecast: /x: No space left on device. Free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "enginecast: file: /x: Permission denied. "),
        (
            MemoryError("Unable to allocate 7 TiB"),
            9,
            "enginecast: there is not enough memory (Unable to allocate 7 TiB)",
        ),
        (KeyboardInterrupt(), INTERRUPTED, "stopped"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BROKEN_PIPE, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_what_is_no_bug(error: BaseException, code: int, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(raises(error), "stopped")
    err = capfd.readouterr().err
    assert (
        caught.value.code == code and err.startswith(line) and err.count("\n") == bool(line) and "Traceback" not in err
    )


def test_a_bug_is_called_one(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(raises(AttributeError("no such thing")))
    err = capfd.readouterr().err
    assert caught.value.code == BUG and "Traceback" in err and "no such thing" in err
    assert err.splitlines()[-1].startswith("This is a bug of enginecast")


def shell(command: str, tmp_path: Path) -> tuple[int, str]:
    """What a shell says of a command line in which `enginecast` is this program."""
    program = f'enginecast() {{ {sys.executable} -m serving.cli.commands "$@"; }}; {command}'
    ended = subprocess.run(
        ["bash", "-c", program],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        timeout=60,
    )
    return ended.returncode, ended.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_standard_output_on_a_full_disk(tmp_path: Path) -> None:
    code, err = shell("enginecast --help > /dev/full", tmp_path)
    assert (
        code == 9
        and err
        == "enginecast: standard output: No space left on device. Free some space there, or choose another folder\n"
    )


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    code, err = shell(f"enginecast --help {closed}", tmp_path)
    assert (code, err) == (0, "")


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    code, err = shell("enginecast --help | true; exit ${PIPESTATUS[0]}", tmp_path)
    assert code in (0, 1, BROKEN_PIPE) and err == ""


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    code, err = shell(f"ulimit -f 0; enginecast keygen {tmp_path}/key.pem", tmp_path)
    assert code == 9 and err == f"enginecast: cannot write {tmp_path}/key.pem: File too large. Choose another place\n"
    assert not (tmp_path / "key.pem").exists()


def test_output_that_cannot_show_a_character(tmp_path: Path) -> None:
    code, err = shell("PYTHONIOENCODING=ascii enginecast inspect $'/\\xff\\xc3\\xa9'", tmp_path)
    assert code == 3 and err.startswith("enginecast: bundle /\\udcff\\xe9 does not exist")


def test_a_folder_that_disappears(tmp_path: Path) -> None:
    code, err = shell(
        f"export PYTHONPATH=$PWD; mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; enginecast keygen "
        "k",
        tmp_path,
    )
    assert code == 9 and err == "enginecast: cannot write k: No such file or directory\n"
