"""The top of every command: a mistake of the user is one line on standard error and an exit code, a bug of ours keeps
its traceback.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from runtime.errors import EnginecastError, ResourceExhausted
from runtime.files import file_error

INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
BUG: Final = 70
"""Exit codes: what shells report of SIGINT and SIGPIPE, and EX_SOFTWARE of sysexits.h."""


def run(app: Callable[[], object], interrupted: str = "") -> NoReturn:
    """Run a command and exit with its code. `interrupted` is said when Ctrl-C ended it.

    Standard streams may be closed, full, or unable to show a character: that is reported, or the character is escaped.
    """
    _prepare_streams()
    try:
        try:
            app()
        finally:
            _flush()  # a full disk shows here, not while Python shuts down
    except KeyboardInterrupt:
        _exit(INTERRUPTED, interrupted)
    except BrokenPipeError:
        _exit(BROKEN_PIPE)
    except Exception as error:
        known = expected(error)
        if known is None:
            _exit(
                BUG,
                f"{traceback.format_exc()}This is a bug of enginecast: please report it with the lines above and the "
                "command",
            )
        _exit(known.exit_code, f"enginecast: {' '.join(str(known).split())}")
    sys.exit(0)


def expected(error: Exception) -> EnginecastError | None:
    """An error as one of ours where the user or the machine is its cause; None where it can only be a bug."""
    if isinstance(error, EnginecastError):
        return error
    if isinstance(error, OSError):
        return file_error(error)
    if isinstance(error, MemoryError):
        return ResourceExhausted(f"there is not enough memory ({error}): free some, or ask for less at once")
    return None


def _prepare_streams() -> None:
    """Open standard streams that are closed, so that no file gets their numbers, and let none fail over a character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: PTH123, SIM115
        elif number and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write what standard output still holds. Where that fails, it is given up: Python would try again, and fail, while
    it shuts down.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = error.filename or "standard output"
        raise


def _exit(code: int, message: str = "") -> NoReturn:
    with suppress(OSError):  # nobody can be told
        if message:
            print(message, file=sys.stderr, flush=True)
    sys.exit(code)
