"""Runs a command: a mistake of the user becomes one line on standard error and an exit code, a bug a traceback."""

from __future__ import annotations

import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, Final, NoReturn, TypeVar, get_type_hints

from runtime.errors import EnginecastError, ResourceExhausted
from runtime.files import file_error

T = TypeVar("T")

INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
BUG: Final = 70
"""Exit codes: those of shells for SIGINT and SIGPIPE, and EX_SOFTWARE of sysexits.h."""


def run(app: Callable[[], object], interrupted: str = "") -> NoReturn:
    """Run a command and exit with its code. The text `interrupted` is printed when Ctrl-C ends it.

    Closed or full standard streams are reported. Characters that a stream cannot show are escaped.
    """
    _prepare_streams()
    try:
        try:
            app()
        finally:
            _flush()  # reports a full disk here, not while Python shuts down
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
    """The error as an EnginecastError if the user or the machine caused it; None for a bug."""
    if isinstance(error, EnginecastError):
        return error
    if isinstance(error, OSError):
        return file_error(error)
    if isinstance(error, MemoryError):
        return ResourceExhausted(f"there is not enough memory ({error}): free some, or request less at once")
    return None


def spread(
    command: Callable[..., T], name: str, options: Mapping[str, tuple[object, object]], gather: Callable[..., object]
) -> Callable[..., T]:
    """The command with `options` in the place of its parameter `name`: annotation and default of each, by its name. It
    gets what `gather` makes of their values.
    """

    @wraps(command)
    def run(**given: Any) -> T:
        gathered = gather(**{option: given.pop(option) for option in options})
        return command(**given, **{name: gathered})

    hints = get_type_hints(command, include_extras=True)
    own = [one.replace(annotation=hints[one.name]) for one in inspect.signature(command).parameters.values()]
    parameters = [one for one in own if one.name != name] + [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for option, (annotation, default) in options.items()
    ]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = inspect.Signature([one.replace(kind=one.KEYWORD_ONLY) for one in parameters])  # type: ignore[attr-defined]
    return run


def _prepare_streams() -> None:
    """Open closed standard streams, so that no file gets their descriptors, and escape characters they cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: PTH123, SIM115
        elif number and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Flush standard output. If that fails, replace it by the null device: Python would flush again while it shuts
    down.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = error.filename or "standard output"
        raise


def _exit(code: int, message: str = "") -> NoReturn:
    with suppress(OSError):  # standard error is closed
        if message:
            print(message, file=sys.stderr, flush=True)
    sys.exit(code)
