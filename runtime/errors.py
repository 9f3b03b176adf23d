"""The exceptions of this program. Every message says what failed, what was expected and what to do.

    EnginecastError
    ├── InvalidInput              a request or argument is wrong; `field` names it
    │   └── ContextLengthExceeded the conversation does not fit the model
    ├── NotFound                  no such model, bundle, file or submodel
    ├── SourceError               a checkpoint cannot be read or is damaged
    │   └── UnsupportedModel      no family knows this architecture
    ├── ParityError               a converted submodel does not reproduce its source
    ├── QualityError              a quantized model is worse than its floors allow
    ├── BundleError               a bundle is damaged or of another schema
    ├── EngineError               an engine failed to compile, load or run
    │   └── EngineUnavailable     no usable engine; every tried target's reason is listed
    ├── ScriptError               a script of a request cannot be used or failed; names it
    ├── MissingDependency         an optional package is not installed; names the extra
    ├── ResourceExhausted         disk, memory or queue is full
    ├── Unavailable               the model is still loading, or the server is stopping
    ├── Unauthenticated           the server requires a token, and the call has none that it knows
    ├── PermissionDenied          the scopes of the token do not allow the call
    ├── DeadlineExceeded          the timeout of a request is over
    └── Cancelled                 the caller stopped the work

Mistakes of users raise one of these and are shown without a traceback; `assert` is for bugs of the program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

SOON: Final = 1.0
"""Seconds to wait before the next attempt, where nothing better is known."""


class EnginecastError(Exception):
    """Base class of all errors that enginecast raises on purpose. `exit_code` is that of the command line,
    `retry_seconds` how long to wait before the same call may succeed, None where waiting does not help.
    `request_id` names the call in the log of the server that reported the error.
    """

    exit_code = 1
    retry_seconds: float | None = None
    request_id: str = ""


class InvalidInput(EnginecastError):
    """A value from the caller is not accepted. `field` is its name in the request or on the command line, `reason` the
    rest of the message.
    """

    exit_code = 2

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


class ContextLengthExceeded(InvalidInput):
    """The tokens of a conversation and its answer do not fit the model's context."""


class NotFound(EnginecastError):
    """A model, bundle, file or submodel of this name does not exist."""

    exit_code = 3


class SourceError(EnginecastError):
    """A checkpoint is missing, damaged or in a refused format."""

    exit_code = 4


class UnsupportedModel(SourceError):
    """No model family knows this architecture."""


class ParityError(EnginecastError):
    """A submodel's ONNX graph does not reproduce the source model within the tolerance."""

    exit_code = 5


class QualityError(EnginecastError):
    """A quantized model differs more from its source than the floors of its quantization allow."""

    exit_code = 5


class BundleError(EnginecastError):
    """A bundle is incomplete, altered or of an unknown schema version."""

    exit_code = 6


class EngineError(EnginecastError):
    """An engine could not compile, load or run a submodel."""

    exit_code = 7


class EngineUnavailable(EngineError):
    """No target of the bundle can be used on this machine."""


class ScriptError(EnginecastError):
    """A script that a request names cannot be imported, or failed. The message names it."""

    exit_code = 14


class MissingDependency(EnginecastError):
    """An optional package is missing or cannot be imported. The message names the extra that installs it."""

    exit_code = 8

    def __init__(self, package: str, extra: str, reason: str = "") -> None:
        install = f"pip install 'enginecast[{extra}]'"
        if reason:
            super().__init__(
                f"{package} is installed and cannot be imported ({reason}): install what is missing, or again with "
                f"{install}"
            )
        else:
            super().__init__(f"{package} is not installed, which this needs: {install}")


class ResourceExhausted(EnginecastError):
    """Disk, memory or the request queue is full, or a token's calls are used up. With `retry_seconds`, trying again
    after that time may succeed.
    """

    exit_code = 9

    def __init__(self, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class Unavailable(EnginecastError):
    """The model is loading or the server is stopping. Trying again later may succeed."""

    exit_code = 10
    retry_seconds = SOON


class DeadlineExceeded(EnginecastError):
    """The timeout of a request is over."""

    exit_code = 11


class Unauthenticated(EnginecastError):
    """The server requires a token, and the call has none that it knows."""

    exit_code = 12


class PermissionDenied(EnginecastError):
    """The scopes of the token do not allow the call."""

    exit_code = 13


class Cancelled(EnginecastError):
    """The caller stopped the work or disconnected."""

    exit_code = 130


SHOWN: Final = 100
"""The most characters of a name that messages quote. Longer names are not compared with known ones."""


def quoted(name: str) -> str:
    """A name for a message: in quotes, with control characters escaped, at most SHOWN characters of it."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name[:SHOWN]
    )
    return f"'{shown}'" if len(name) <= SHOWN else f"'{shown}...' ({len(name):,} characters)"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names as a phrase, the nearest one first: "did you mean 'int8'? (known: int4, int8, none)"."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5) if len(name) <= SHOWN else []
    question = f"did you mean '{near[0]}'? " if near else ""
    return f"{question}(known: {', '.join(names)})"
