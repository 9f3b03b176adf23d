"""Measure models side by side: each in a process of its own, in turns (A B A B), after one run that does not count.

Turns matter because a machine's speed drifts with its load and temperature: all models then see the same drift.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

from rich.table import Table

from calibration.ground import machine
from profiles.memory import GB, Sampler, session_memory, supported
from profiles.protocol import Hello
from profiles.rows import Row
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError, InvalidInput, NotFound, did_you_mean
from runtime.placing.fingerprint import here
from runtime.placing.processor import processor
from runtime.timing import Spread, turns

PATIENCE: Final = 10.0
"""Seconds that a worker gets to end after its input has ended."""
Say = Callable[[str], None]


class Worker:
    """A process that measures one model, from `with` to its end. Raises EngineError with the worker's message when it
    fails.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.name = " ".join(command[:3])

    def __enter__(self) -> Worker:
        try:
            # A session of its own, so that its memory is measured apart from others'.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
        except OSError as error:
            raise NotFound(f"worker '{self._command[0]}' cannot be started: {error.strerror}") from None
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
            raise EngineError(f"{self.name} ended before it measured {line}: see its messages above") from None
        return self._read()

    def peak_memory(self) -> int | None:
        """Peak bytes of anonymous memory since the last call; None where that cannot be measured."""
        return self._sampler.cut().anonymous if self._sampler is not None else None

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            message = json.loads(line)
        except ValueError:
            said = f"said '{line.strip()}'" if line.strip() else f"ended with exit code {self._process.wait()}"
            raise EngineError(f"{self.name} {said}, expected a line of JSON: see its messages above") from None
        if "error" in message:
            raise EngineError(f"{self.name}: {message['error']}")
        return dict(message)


def bundle_worker(job: Job) -> Worker:
    """The worker that measures a bundle of ours."""
    return Worker([sys.executable, "-m", "profiles.worker", job.model_dump_json()])


@dataclass(frozen=True)
class BenchPlan:
    """Which metrics to measure, and how often. No metrics means all of the workers'."""

    repeat: int = 5
    metrics: tuple[str, ...] = ()


def bench(bundle: Bundle, workers: Iterable[Worker], plan: BenchPlan, say: Say = lambda line: None) -> list[Row]:
    """Measure all workers in turns; a row for each metric of each. Raises EngineError, or InvalidInput for a metric
    none of them has.
    """
    say(str(here()))
    with ExitStack() as stack:
        entered = [stack.enter_context(worker) for worker in workers]  # one after another: loading is timed too
        metrics = _wanted(plan.metrics, entered)
        needs = [
            metric["bytes"]
            for worker in entered
            for name, metric in worker.hello["metrics"].items()
            if name in metrics and "bytes" in metric
        ]
        bandwidth = machine.read_bandwidth() if needs else 0.0
        if needs:
            say(f"memory is read at {bandwidth / GB:.1f} GB/s")
        rows = []
        for metric in metrics:
            having = [worker for worker in entered if metric in worker.hello["metrics"]]
            for worker, values in zip(
                having, turns([_measurement(worker, metric) for worker in having], plan.repeat), strict=True
            ):
                rows.append(_row(bundle, worker, metric, values, bandwidth))
                say(f"{metric} on {worker.hello['target']}: {rows[-1].spread.median:.4g} {rows[-1].unit}")
        for worker in entered:
            rows += whole(bundle, worker)
    return rows


def _measurement(worker: Worker, metric: str) -> Callable[[], float]:
    return lambda: worker.measure(metric)


def _wanted(requested: Sequence[str], workers: Sequence[Worker]) -> list[str]:
    known = dict.fromkeys(name for worker in workers for name in worker.hello["metrics"])
    for name in requested:
        if name not in known:
            raise InvalidInput("metric", f"'{name}' is not measured of this bundle: {did_you_mean(name, known)}")
    return list(requested or known)


def _row(bundle: Bundle, worker: Worker, name: str, values: Sequence[float], bandwidth: float) -> Row:
    metric = worker.hello["metrics"][name]
    bound = bandwidth / metric["bytes"] if "bytes" in metric else None
    return labelled(bundle, worker.hello, name, metric["unit"], values, bound, metric.get("settings", {}))


def whole(bundle: Bundle, worker: Worker) -> list[Row]:
    """Figures without repetitions: loading, and the peak of memory over the whole run."""
    rows = [labelled(bundle, worker.hello, "load", "s", [worker.hello["load"]])]
    peak = worker.peak_memory()
    return rows if peak is None else [*rows, labelled(bundle, worker.hello, "memory", "GB", [peak / GB])]


def labelled(
    bundle: Bundle,
    hello: Hello,
    metric: str,
    unit: str,
    values: Sequence[float],
    bound: float | None = None,
    settings: Mapping[str, int | float | str] | None = None,
) -> Row:
    """The row of a figure that a worker measured."""
    return Row(
        metric=metric,
        unit=unit,
        spread=Spread.of(values),
        bound=bound,
        program=hello["program"],
        bundle=bundle.name,
        source=bundle.manifest.source.name,
        family=bundle.manifest.source.family,
        quant=hello.get("quant", bundle.manifest.quant),
        target=hello["target"],
        device=hello["device"],
        cpu=processor(),
        threads=hello["threads"],
        settings=settings or {},
        versions=hello["versions"],
        date=datetime.now(UTC),
        notes=hello.get("notes", ""),
        fingerprint=here(),
    )


def table(rows: Sequence[Row]) -> Table:
    """Rows for reading: metrics together, each compared with the first program and target that has it."""
    shown = Table("metric", "program", "target", "median", "quartiles", "range", "n", "of bound", "ratio")
    first: dict[str, float] = {}
    for metric in dict.fromkeys(row.metric for row in rows):
        for row in (row for row in rows if row.metric == metric):
            spread = row.spread
            base = first.setdefault(metric, spread.median)
            unit, scale = ("ms", 1e3) if row.unit == "s" and base < 0.1 else (row.unit, 1.0)
            lowest, lower, median, upper, highest = (
                f"{value * scale:.4g}"
                for value in (spread.minimum, spread.lower, spread.median, spread.upper, spread.maximum)
            )
            shown.add_row(
                metric,
                row.program,
                f"{row.target} {row.quant}",
                f"{median} {unit}",
                f"{lower}..{upper}",
                f"{lowest}..{highest}",
                str(spread.repetitions),
                f"{spread.median / row.bound:.0%}" if row.bound else "",
                f"{spread.median / base:.2f}" if base else "",
            )
    return shown
