"""The protocol between a measuring driver and its workers: lines of JSON on the worker's standard input and output.

A worker is a program that loads one model and measures it on request. Its first line describes it and its metrics
(`Hello`). Then it answers each input line, the name of a metric, with {"value": number} or {"error": text}, and ends
when its input ends. So models that cannot share a process, such as ours and a peer's, are measured in turns on the
same machine within one run.

A worker that measures a server has the metric served_throughput. Its lines are loads ("closed 8 32": of 8 clients, 32
requests in all; "open 0.5 32": arriving one in 2 seconds), and its answers what was observed: see
`profiles.serving.load`.

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
    """A metric. `bytes` are the bytes read from memory for one unit of it, where they limit a rate. `name` is what rows
    call it, where several metrics of a worker are one that is measured at several settings.
    """

    unit: str
    name: NotRequired[str]
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
    """The worker's side. Create it first: from then on, output of libraries goes to standard error, so that only
    messages reach the driver.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, hello: Hello, probes: Mapping[str, Callable[[], float]]) -> None:
        """Send the first message, then measure each requested metric until the input ends."""
        self.answer(hello, lambda line: {"value": probes[line]()})

    def answer(self, hello: Hello, measure: Callable[[str], Mapping[str, object]]) -> None:
        """Send the first message, then answer each line until the input ends."""
        self._send(hello)
        for line in sys.stdin:
            try:
                self._send(measure(line.strip()))
            except Exception as error:  # the driver reports every failure
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Report an error to the driver."""
        self._send({"error": f"{type(error).__name__}: {error}"})

    def _send(self, message: Mapping[str, object]) -> None:
        print(json.dumps(message), file=self._out, flush=True)
