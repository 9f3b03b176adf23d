"""A command at a pseudo-terminal: what is typed there, and what it shows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

ROOT: Final = Path(__file__).parents[2]
CONTROLS: Final = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
PROGRAM: Final = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from serving.cli.commands import main
main()
"""
"""The command, which takes the terminal first: its keys such as Ctrl-C then go to it."""
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """`enginecast` with arguments, as its user sees it. `environment` is added to the test's own, where no variable
    says which terminal it is.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None, folder: Path = ROOT) -> None:
        self._ours, theirs = pty.openpty()
        own = {name: value for name, value in os.environ.items() if name not in ("COLORTERM", "TERM_PROGRAM", "TMUX")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, start_new_session=True,
            env={**own, "TERM": "xterm", "PYTHONPATH": str(ROOT), **(environment or {})},
        )  # fmt: skip
        os.close(theirs)
        self.raw = b""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(20)
        os.close(self._ours)

    @property
    def text(self) -> str:
        """All that was shown, without control sequences."""
        return CONTROLS.sub(b"", self.raw).decode(errors="replace").replace("\r", "")

    def wait(self, text: str, seconds: float = 30) -> None:
        """Wait until a text is shown behind those that were waited for."""
        limit = time.monotonic() + seconds
        while (found := self.text.find(text, self._seen)) < 0:
            assert time.monotonic() < limit, f"{text!r} was not shown: {self.text[self._seen :]!r}"
            self._read(0.1)
        self._seen = found + len(text)

    def type(self, *keys: str | bytes) -> None:
        """Press keys: lines get their end. Wait for a prompt before other keys: until then the terminal, not the
        command, decides what they do.
        """
        for one in keys:
            os.write(self._ours, one if isinstance(one, bytes) else f"{one}\n".encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt. Python's readline loses one in the moment between showing something and reading."""
        time.sleep(0.5)
        self.type(b"\x03")

    def end(self, seconds: float = 20) -> int:
        """Wait for the end of the command; its exit code."""
        limit = time.monotonic() + seconds
        while self._process.poll() is None or select.select([self._ours], [], [], 0)[0]:
            assert time.monotonic() < limit, f"it did not end: {self.text[self._seen :]!r}"
            if not self._read(0.1):
                break
        return self._process.wait(20)

    def _read(self, seconds: float) -> bool:
        """Read for some time; whether there may be more."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return True
        try:
            read = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += read
        return bool(read)
