"""A worker's process, as the driver sees it: its first message, its answers, its peak memory, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from profiles.memory import Sampler, Usage, session_memory, supported
from profiles.protocol import Hello
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError, NotFound

PATIENCE: Final = 10.0
"""Seconds that a worker gets to end after its input has ended."""


class Worker:
    """A process that measures one model, from `with` to its end. Raises EngineError with the worker's message when it
    fails. `bundle` is what its rows are of, where that is not the bundle that all are measured beside. `log` is a file
    for what it says on standard error, this process's own without one; `name` is what messages call it.
    """

    def __init__(
        self,
        command: Sequence[str],
        bundle: Bundle | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        name: str = "",
    ) -> None:
        self._command = command
        self._log = log
        self._environment = os.environ | dict(environment or {})
        self.bundle = bundle
        self.name = name or " ".join(command[:3])

    def __enter__(self) -> Worker:
        self._process = self._started()
        self._sampler = Sampler(lambda: session_memory(self._process.pid)) if supported() else None
        if self._sampler is not None:
            self._sampler.__enter__()
        try:
            message: Any = self._read()
            if "metrics" not in message:
                raise EngineError(
                    f"{self.name} does not begin with its metrics: see profiles/protocol.py for a worker's messages"
                )
        except BaseException:
            self._stop(0)
            raise
        self.hello: Hello = message
        return self

    def _started(self) -> subprocess.Popen[str]:
        """The process, in a session of its own, so that its memory is measured apart from others'."""
        with ExitStack() as stack:
            log = stack.enter_context(self._log.open("w")) if self._log is not None else None
            try:
                return subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    bufsize=1,
                    start_new_session=True,
                    env=self._environment,
                )
            except OSError as error:
                raise NotFound(f"worker '{self._command[0]}' cannot be started: {error.strerror}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(PATIENCE if kind is None else 0)

    def _stop(self, patience: float) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._sampler is not None:
            self._sampler.__exit__(None, None, None)
        self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self._process.stdout.close()

    def _kill(self) -> None:
        """End it and what it started, such as a server."""
        if hasattr(os, "killpg"):
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def measure(self, metric: str) -> float:
        """One repetition."""
        message = self.ask(metric)
        if not isinstance(message.get("value"), (int, float)):
            raise EngineError(f"{self.name} answered {message} for {metric}, expected a number")
        return float(message["value"])

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise EngineError(f"{self.name} ended before it measured {line}: {self._see}") from None
        return self._read()

    def peak_memory(self) -> int | None:
        """Peak bytes of anonymous memory since the last call; None where that cannot be measured."""
        usage = self.usage()
        return usage.anonymous if usage is not None else None

    def usage(self) -> Usage | None:
        """Peaks of memory since the last call of this or of `peak_memory`; None where they cannot be measured."""
        return self._sampler.cut() if self._sampler is not None else None

    @property
    def _see(self) -> str:
        return f"see its messages in {self._log}" if self._log is not None else "see its messages above"

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            message = json.loads(line)
        except ValueError:
            said = f"said '{line.strip()}'" if line.strip() else f"ended with exit code {self._process.wait()}"
            raise EngineError(f"{self.name} {said}, expected a line of JSON: {self._see}") from None
        if "error" in message:
            raise EngineError(f"{self.name}: {message['error']}")
        return dict(message)
