"""How a measuring driver and its workers talk: lines of JSON over the worker's standard input and output.

A worker is a program that loads one model and measures it when told to. Its first line says what it is and what it can
measure (`Hello`); then it answers each line, the name of a metric, with {"value": number} or {"error": text}, and ends
when its input ends. So models that cannot live in one process, ours and a peer's, are measured in turns on the same
machine within one run.

This file needs nothing but Python, so that a worker can run in a peer's own environment with this repository on
PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import NotRequired, TypedDict


class Metric(TypedDict):
    """What a value of this metric means. `bytes` is how much must be read from memory for one unit of it, where that
    bounds a rate.
    """

    unit: str
    settings: NotRequired[dict[str, int | float | str]]
    bytes: NotRequired[float]


class Hello(TypedDict):
    """A worker's first line. `load` is the seconds from its start until the model could be used."""

    program: str
    target: str
    device: str
    threads: int
    versions: dict[str, str]
    load: float
    metrics: dict[str, Metric]
    quant: NotRequired[str]
    notes: NotRequired[str]


class Channel:
    """The worker's end. Make it first: from then on whatever libraries print goes to standard error, and lines to the
    driver stay clean.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, hello: Hello, probes: Mapping[str, Callable[[], float]]) -> None:
        """Say hello, then measure what is asked for until there are no more questions."""
        self._send(hello)
        for line in sys.stdin:
            try:
                self._send({"value": probes[line.strip()]()})
            except Exception as error:  # whatever it is, the driver must hear of it
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Tell the driver what went wrong."""
        self._send({"error": f"{type(error).__name__}: {error}"})

    def _send(self, message: Mapping[str, object]) -> None:
        print(json.dumps(message), file=self._out, flush=True)
