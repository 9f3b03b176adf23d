"""The progress of a build: its planned steps, the running one, and the time that the rest will take."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from calibration.ground.progress import Position, listening

BEAT: Final = 1.0
"""Seconds between two reports of a step that reports no progress of its own."""
TRUSTED: Final = 0.25
"""Share of a step after which its own pace alone gives its duration; before, the guess counts as well."""
START: Final = Position(0.0, 0.0, "")
OVERDUE: Final = 0.5
"""Remaining time of a step that reports no progress and takes longer than guessed, as a share of its time so far."""


@dataclass(frozen=True)
class ProgressStep:
    """One stage of one submodel. `cost` is a guess of its seconds on a usual machine."""

    submodel: str
    stage: str
    cost: float


@dataclass(frozen=True)
class Report:
    """A step begins or is under way (`seconds` None), or has ended. `eta` is the seconds that the rest of all steps
    will take.

    `detail` is how far a running step is, or a result of an ended one, such as a size or an error. `elapsed` is the
    seconds since the step began.
    """

    number: int
    total: int
    step: ProgressStep
    eta: float
    seconds: float | None = None
    detail: str = ""
    elapsed: float = 0.0


Listener = Callable[[Report], None]


@dataclass
class Progress:
    """Runs through planned steps in order, and reports each at its begin, its end, wherever its loops are, and once
    every `BEAT` seconds.

    The ETA is the remaining time of the running step, by its pace, and the guesses of all later ones, scaled by how
    well earlier guesses of their stages did.
    """

    steps: list[ProgressStep]
    listen: Listener
    timings: dict[str, float] = field(default_factory=dict)
    _done: int = 0
    _running: ProgressStep | None = None
    _start: float = 0.0
    _position: Position = START
    _spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _guessed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def step(self, submodel: str, stage: str) -> Iterator[list[str]]:
        """Do one step. Texts appended to the list become its detail."""
        step = next(s for s in self.steps if (s.submodel, s.stage) == (submodel, stage))
        notes, ended = list[str](), threading.Event()
        self._running, self._start = step, time.perf_counter()
        self._at(START)
        beat = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        beat.start()
        try:
            with listening(self._at):
                yield notes
        finally:
            ended.set()
            beat.join()
        seconds = time.perf_counter() - self._start
        self._done, self._running = self._done + 1, None
        self._spent[step.stage] += seconds
        self._guessed[step.stage] += step.cost
        self.timings[step.stage] = self.timings.get(step.stage, 0.0) + seconds
        self.listen(Report(self._done, len(self.steps), step, self._eta(), seconds, ", ".join(notes), seconds))

    def compiling(self, share: float, text: str) -> None:
        """Takes an engine's reports while it compiles, on any thread (`runtime.engine.CompileOptions.progress`)."""
        self._at(Position(share, 0.0, f"{text} {100 * share:.0f} %"))

    def _at(self, position: Position) -> None:
        self._position = position
        self._report()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT):
            self._report()

    def _report(self) -> None:
        with self._lock:
            if self._running is not None:
                elapsed = time.perf_counter() - self._start
                number, total = self._done + 1, len(self.steps)
                self.listen(Report(number, total, self._running, self._eta(), None, self._position.text, elapsed))

    def _eta(self) -> float:
        waiting = self.steps[self._done + (self._running is not None) :]
        return sum(map(self._guess, waiting)) + (self._left(self._running) if self._running else 0.0)

    def _guess(self, step: ProgressStep) -> float:
        """Seconds of a step that has not begun."""
        guessed = self._guessed[step.stage]
        return step.cost * (self._spent[step.stage] / guessed if guessed else 1.0)

    def _left(self, step: ProgressStep) -> float:
        """Seconds that the running step still needs."""
        elapsed, guess = time.perf_counter() - self._start, self._guess(step)
        share, free, _ = self._position
        done = share - free
        if done <= 0:
            return max(guess * (1 - share) - elapsed, OVERDUE * elapsed)
        own, trust = elapsed * (1 - share) / done, min(done / TRUSTED, 1.0)
        return trust * own + (1 - trust) * max(guess * (1 - share), own)
