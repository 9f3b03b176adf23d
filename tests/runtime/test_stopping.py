"""Signals end a process in order where Python runs, and all the same where it does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, os, sys, time
from pathlib import Path
from runtime.files import vanishing
from runtime.stopping import stoppable

@stoppable("nothing was written")
def work():
    with vanishing(Path(sys.argv[1]), "work-"):
        try:
            print("ready", flush=True)
            {wait}
        finally:
            print("in order", flush=True)

work()
"""
PYTHON = "time.sleep(60)"
NATIVE = "[ctypes.CDLL(None).usleep(60_000_000) for _ in range(9)]"
SWALLOWED = """
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
"""


@pytest.mark.parametrize(("end", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize(
    ("wait", "orderly"), [(PYTHON, True), (NATIVE, None), (SWALLOWED, None)], ids=["python", "native", "swallowed"]
)
def test_a_signal_ends_it(tmp_path: Path, end: signal.Signals, word: str, wait: str, orderly: bool | None) -> None:
    command = [sys.executable, "-c", PROGRAM.format(wait=wait), str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n" and list(tmp_path.iterdir())
        start = time.monotonic()
        process.send_signal(end)
        out, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert (process.returncode, errors) == (128 + end, f"enginecast: {word}: nothing was written\n")
    assert orderly is None or ("in order" in out) == orderly
    while list(tmp_path.iterdir()):
        assert time.monotonic() - start < 20, "the janitor removes what is left"
        time.sleep(0.05)
