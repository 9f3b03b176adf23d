"""The two packages that share TensorRT's Python API, and their log messages."""

from __future__ import annotations

from typing import Any, NamedTuple

from runtime.optional import require
from runtime.targets.nvidia import cuda


class SDK(NamedTuple):
    """One of the two packages. `ahead`: it compiles on machines without a GPU, for the compute capabilities in the
    settings.
    """

    module: str
    name: str
    extra: str
    ahead: bool


def driver(sdk: SDK) -> int:
    """The major version of the newest CUDA that this machine's driver supports, 0 where it cannot be found out."""
    code, version = require(cuda.MODULE, sdk.extra).cudaDriverGetVersion()
    return 0 if int(code) else int(version) // 1000


def dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def reasons(messages: list[str]) -> str:
    """The SDK's first error: the others follow from it."""
    return "; ".join([text for text in dict.fromkeys(messages) if "catchCudaError" not in text][:2] or messages[:1])


def logger(trt: Any, messages: list[str]) -> Any:
    """A logger that collects errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(text)

    return Logger()
