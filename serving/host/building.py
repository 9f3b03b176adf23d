"""Builds a bundle beside the server, with `enginecast build` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.errors import EnginecastError, InvalidInput, SourceError

COMMAND: Final = (sys.executable, "-m", "serving.cli.commands", "build")
STEP: Final = re.compile(r"\[ *(\d+)/(\d+)\] (.*)")
PROGRAM: Final = "enginecast: "
"""What the line of an error begins with."""
GRACE: Final = 10.0
"""Seconds that a build gets to remove what it has written when it is stopped."""
LONGEST: Final = 1 << 16
"""Bytes of a line of its output."""
MISTAKE: Final = InvalidInput.exit_code


@dataclass(frozen=True)
class Step:
    """Step `number` of `total`, as a line of text."""

    text: str
    number: int
    total: int


async def built(source: Path, output: Path, name: str, quant: str = "") -> AsyncGenerator[Step, None]:
    """Build a bundle of the checkpoint `source`; yields its steps. Closing stops it, and nothing is left. Raises the
    error that the build ended with.
    """
    options = ("--output", str(output), "--name", name, *(("--quant", quant) if quant else ()))
    process = await asyncio.create_subprocess_exec(
        *COMMAND, str(source), *options,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        start_new_session=True, limit=LONGEST,
    )  # fmt: skip
    last = ""
    try:
        assert process.stdout is not None
        async for data in process.stdout:
            last = data.decode(errors="replace").strip() or last
            if found := STEP.match(last):
                yield Step(found[3].strip(), int(found[1]), int(found[2]))
        if (code := await process.wait()) != 0:
            raise _failed(code, last.removeprefix(PROGRAM))
    finally:
        await _ended(process)


def _failed(code: int, why: str) -> EnginecastError:
    if code == MISTAKE:
        field, _, reason = why.partition(": ")
        return InvalidInput(field, reason) if reason else SourceError(why)
    return SourceError(f"the build failed: {why}")


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Stop the process and those that it has begun, if they still run."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE)
