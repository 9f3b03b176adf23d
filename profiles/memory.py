"""Peak memory and wall time of a command and everything it starts: `python -m profiles.memory [--until REGEX] --
COMMAND...`

Anonymous memory (RssAnon of /proc/PID/status) is what a program needs for itself; pages mapped from files belong to the
page cache, which the system can take back. The processes counted are those of the command's session, so children that
outlive their parent count as well. Linux only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final

import typer

from runtime.errors import EnginecastError, InvalidInput, NotFound, Unavailable

INTERVAL: Final = 0.05
"""Seconds between two samples."""
GB: Final = 1e9
_FIELDS: Final = re.compile(r"^(RssAnon|VmRSS):\s+(\d+) kB$", re.MULTILINE)
_SESSION: Final = 3
"""Place of the session's number in /proc/PID/stat, counted behind the parenthesised name (proc(5))."""


@dataclass(frozen=True)
class Usage:
    """Wall seconds, and peaks in bytes of anonymous memory and of all resident pages, each summed over the processes at
    one moment.
    """

    seconds: float = 0.0
    anonymous: int = 0
    resident: int = 0

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, peak {self.anonymous / GB:.2f} GB anonymous, {self.resident / GB:.2f} GB resident"
        )


@dataclass(frozen=True)
class Stretch:
    """The use between two lines of output; `line` is the later one, "" after the last."""

    line: str
    usage: Usage


@dataclass(frozen=True)
class Measured:
    """A finished command: its exit code and its stretches in order."""

    exit_code: int
    stretches: tuple[Stretch, ...]

    @property
    def whole(self) -> Usage:
        return total(stretch.usage for stretch in self.stretches)

    def before(self, pattern: re.Pattern[str]) -> Usage | None:
        """The use before the stretch whose line is the first to match; None if none does."""
        for number, stretch in enumerate(self.stretches):
            if pattern.search(stretch.line):
                return total(earlier.usage for earlier in self.stretches[:number])
        return None

    def matching(self, pattern: re.Pattern[str]) -> Usage:
        """The use in the stretches whose lines match: a line is printed when its step is done."""
        return total(stretch.usage for stretch in self.stretches if pattern.search(stretch.line))


def total(usages: Iterable[Usage]) -> Usage:
    """Seconds add up, peaks do not."""
    found = list(usages)
    peaks = (max((getattr(usage, name) for usage in found), default=0) for name in ("anonymous", "resident"))
    return Usage(sum(usage.seconds for usage in found), *peaks)


def session_memory(session: int) -> tuple[int, int]:
    """Bytes of anonymous and of resident memory, summed over the processes of a session at this moment."""
    anonymous = resident = 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or _session_of(process) != session:
            continue
        fields = dict(_FIELDS.findall(_read(process / "status")))
        anonymous += int(fields.get("RssAnon", 0)) * 1024
        resident += int(fields.get("VmRSS", 0)) * 1024
    return anonymous, resident


def _session_of(process: Path) -> int | None:
    stat = _read(process / "stat")
    return int(stat.rpartition(")")[2].split()[_SESSION]) if stat else None


def _read(path: Path) -> str:
    """The file's text; "" when the process has ended meanwhile."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Sampler:
    """Calls `look` every `INTERVAL` seconds, in a thread, from `with` to its end. Raises Unavailable where there
    is no /proc.
    """

    def __init__(self, look: Callable[[], tuple[int, int]]) -> None:
        if not supported():
            raise Unavailable("memory is measured through /proc/PID/status, which this system lacks: measure on Linux")
        self._look = look
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._since, self._anonymous, self._resident = time.perf_counter(), 0, 0

    def __enter__(self) -> Sampler:
        self._since = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def cut(self) -> Usage:
        """The use since the last cut, or since the beginning."""
        self._sample()
        with self._lock:
            now = time.perf_counter()
            usage = Usage(now - self._since, self._anonymous, self._resident)
            self._since, self._anonymous, self._resident = now, 0, 0
        return usage

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        anonymous, resident = self._look()
        with self._lock:
            self._anonymous, self._resident = max(self._anonymous, anonymous), max(self._resident, resident)


def supported() -> bool:
    """Whether this system reports the memory of processes."""
    return Path("/proc/self/status").is_file()


def measure(
    command: Sequence[str],
    echo: Callable[[Stretch], None] = lambda stretch: None,
    variables: Mapping[str, str] | None = None,
    errors: int | None = None,
) -> Measured:
    """Run a command in a session of its own, with these variables besides; `echo` gets each line of its output.
    `errors` is where its standard error goes, as for subprocess. Raises NotFound if it cannot be started.
    """
    # a line must come when it is printed, not when a buffer is full
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(variables or {})
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise NotFound(f"command '{command[0]}' cannot be started: {error.strerror}") from None
    assert process.stdout is not None
    stretches = []
    with process, Sampler(lambda: session_memory(process.pid)) as sampler:
        try:
            for line in process.stdout:
                stretches.append(Stretch(line.rstrip("\n"), sampler.cut()))
                echo(stretches[-1])
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        stretches.append(Stretch("", sampler.cut()))
    return Measured(process.returncode, tuple(stretches))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"ignore_unknown_options": True})
def main(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run and measure.")],
    until: Annotated[
        str | None, typer.Option(help="Report apart what was used before and in the steps whose output lines match.")
    ] = None,
) -> None:
    """Print wall seconds, peak anonymous and peak resident memory of a command and its children; exit with its exit
    code.

    Each line of the command's output is preceded by the peak of anonymous memory since the line before.
    """
    try:
        pattern = re.compile(until) if until is not None else None
    except re.error as error:
        raise InvalidInput("until", f"is no regular expression: {error}") from None
    measured = measure(
        command, lambda stretch: print(f"{stretch.usage.anonymous / GB:5.2f} GB  {stretch.line}", flush=True)
    )
    print(f"whole: {measured.whole}")
    if pattern is not None:
        before, matching = measured.before(pattern), measured.matching(pattern)
        print(f"before the first '{until}': {before or 'no line matched'}")
        print(f"steps '{until}': {matching}")
        print(f"without them: {measured.whole.seconds - matching.seconds:.1f} s")
    raise typer.Exit(measured.exit_code)


if __name__ == "__main__":
    try:
        app()
    except EnginecastError as problem:
        sys.exit(f"profiles.memory: {problem}")
