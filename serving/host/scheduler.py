"""The thread of one model: it drives the pipelines of all its requests, and decides whose call is next.

Decoders have every second turn; between two of them each other submodel has one, and those that answers wait for on
their way to their next token, such as a draft, have as many as it takes. Where calls take long, as a denoising
step does, clients take turns by the seconds they used.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Final, TypeVar
from weakref import WeakSet

from runtime.engine import Engine
from runtime.placing.arriving import wanted
from serving.host import batches
from serving.host.batches import Ran, stateful
from serving.host.joining import Joining
from serving.host.run import Run
from serving.host.shares import Shares

log = logging.getLogger(__name__)

T = TypeVar("T")

TURN_SECONDS: Final = 0.02
"""Calls of one submodel are made one after another in one turn up to this time."""
EXTRA: Final = 4
"""One more request in 4 may run, of clients of which none runs."""


class Scheduler:
    """Runs at most `slots` requests at once, and a few more of clients of which none runs; the others wait. Methods may
    be called from any thread.

    `ran` is called in its thread with every run of an engine.
    """

    def __init__(self, name: str, slots: int, ran: Callable[[Ran], None] = lambda ran: None) -> None:
        self.name, self.slots, self._ran = name, slots, ran
        self._changed = threading.Condition()
        self._works: deque[Callable[[], None]] = deque()
        self._waiting: list[Run] = []
        self._active: list[Run] = []
        self._woken = self._closed = False
        self._thread: threading.Thread | None = None
        self._shares = Shares()
        self._joining = Joining(name)
        self._had_turns: set[str] = set()
        self._decoded = WeakSet[Run]()
        """The requests of the decoder's last run."""

    @property
    def running(self) -> int:
        """Requests that have left the queue."""
        return len(self._active)

    @property
    def waiting(self) -> list[Run]:
        """The queue, in the order of arrival."""
        with self._changed:
            return list(self._waiting)

    def submit(self, run: Run) -> None:
        """Queue a request."""
        with self._changed:
            self._waiting.append(run)
            self._wake()

    def changed(self, run: Run) -> None:
        """A request may go on, or was stopped: one that still waits ends at once."""
        with self._changed:
            waits = run.job.stopped_by is not None and run in self._waiting
            if waits:
                self._waiting.remove(run)
            self._wake()
        if waits:
            run.end(run.job.stopped_by)

    def wake(self) -> None:
        """An engine is there that a request may wait for."""
        with self._changed:
            self._wake()

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Call a function between two calls of engines."""
        future = Future[T]()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # it is raised again where the result is read
                future.set_exception(error)

        with self._changed:
            self._works.append(run)
            self._wake()
        return future

    def close(self) -> None:
        """Let the thread end when it has nothing left to do."""
        with self._changed:
            self._closed = True
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _main(self) -> None:
        while self._waits_for_something():
            try:
                self._step()
            except Exception as error:  # a fault of this file: those who wait must not wait for ever
                log.exception("model %s: the scheduler failed, its requests end", self.name)
                for run in self._active:
                    run.end(error)

    def _step(self) -> None:
        self._settle()
        work = self._work()
        if work is not None:
            work()
        else:
            self._admit()
            self._turn()

    def _waits_for_something(self) -> bool:
        """Wait until there is something to do. False at the end."""
        with self._changed:
            while not (self._woken or self._works or any(_callable(run) for run in self._active)):
                if self._closed:
                    self._thread = None  # under the lock: what is asked for from now on starts another
                    return False
                self._changed.wait()
            self._woken = bool(self._works)  # requests that came beside work are looked at after it
            return True

    def _work(self) -> Callable[[], None] | None:
        with self._changed:
            return self._works.popleft() if self._works else None

    def _settle(self) -> None:
        """End requests that were stopped, continue those whose reader made room, drop those that ended."""
        for run in self._active:
            if run.future.done():
                continue
            if run.job.stopped_by is not None:
                run.end(run.job.stopped_by)
            elif run.call is None:
                run.advance()
        self._active = [run for run in self._active if not run.future.done()]
        if not self._active:
            self._shares.present(())

    def _admit(self) -> None:
        while run := self._next():
            self._active.append(run)
            self._shares.present({one.client for one in self._active})
            run.started_at = monotonic()
            run.advance()

    def _next(self) -> Run | None:
        """The request that leaves the queue, if there is room: of the highest priority, then of the client of which
        fewest run, then of the one that used the engines least, then the one that came first.
        """
        if not self._waiting:
            return None
        running = Counter(run.client for run in self._active)

        def order(run: Run) -> tuple[float, ...]:
            return -run.priority, running[run.client], self._shares.used(run.client)

        with self._changed:
            if not self._waiting:
                return None
            run = min(self._waiting, key=order)
            if len(self._active) >= self.slots + (0 if running[run.client] else self.slots // EXTRA):
                return None
            self._waiting.remove(run)
            return run

    def _turn(self) -> None:
        """Make calls of one submodel."""
        groups = defaultdict[str, list[Run]](list)
        for run in self._active:
            if run.call is not None and _callable(run):
                groups[run.call.submodel].append(run)
        if not groups:
            return
        name = self._whose(groups)
        if stateful(groups[name][0]):
            made = batches.decode(groups[name][0].job.engines[name], groups[name])
            self._decoded = WeakSet(run for ran in made for run in ran.runs)
            for ran in made:
                self._charge(ran)
        else:
            self._compute(name, groups[name])

    def _whose(self, groups: dict[str, list[Run]]) -> str:
        """The submodel whose turn it is: one that had none since the last run of a decoder, or that requests of that
        run wait for, so that they come to the next one together; else the decoder.
        """
        others = [
            name
            for name, runs in groups.items()
            if not stateful(runs[0]) and (name not in self._had_turns or any(run in self._decoded for run in runs))
        ]
        decoders = [name for name in groups if stateful(groups[name][0])]
        name = next(iter(others or decoders or groups))
        if name in decoders or not others:
            self._had_turns.clear()
        if name not in decoders:
            self._had_turns.add(name)
        return name

    def _compute(self, name: str, runs: Sequence[Run]) -> None:
        """Calls of a submodel without states: several where they are short, first that of the client that used the
        engines least, joined by others where that pays.
        """
        left = TURN_SECONDS
        waiting = sorted(runs, key=lambda run: self._shares.used(run.client))
        while waiting:
            ran = self._make(waiting[0].job.engines[name], waiting)
            waiting = [run for run in waiting if run not in ran.runs and run.job.stopped_by is None]
            left -= ran.seconds
            if left < ran.seconds:
                return

    def _make(self, engine: Engine, runs: Sequence[Run]) -> Ran:
        """The call of the first of these requests, with those that join it."""
        joined = self._joining.joined(engine, runs)
        assert joined[0].call is not None, "it waits for a call"
        inputs = joined[0].call.inputs
        ran = batches.together(engine, joined) if len(joined) > 1 else None
        if ran is None:
            if len(joined) > 1:
                self._joining.refuse(engine, inputs)
            ran = batches.alone(joined[0])
        self._joining.note(engine, inputs, len(ran.runs), ran.seconds)
        self._charge(ran)
        return ran

    def _charge(self, ran: Ran) -> None:
        self._ran(ran)
        for run in ran.runs:
            self._shares.charge(run.client, ran.seconds / len(ran.runs) * run.place.terms.priority.cost)


def _callable(run: Run) -> bool:
    """Whether a request waits for a call whose engine is loaded."""
    return run.call is not None and wanted(run.job.engines, run.call.submodel)
