"""What a build is doing: the steps it will take, which one runs, how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Step:
    """One stage of one submodel. `cost` is a first guess of its seconds, used only in proportion."""

    submodel: str
    stage: str
    cost: float


@dataclass(frozen=True)
class Report:
    """A step begins or is under way (`seconds` None), or has ended. `eta` is the seconds that the rest will take.

    `detail` says how far a step is, and of one that has ended such as a size or an error.
    """

    number: int
    total: int
    step: Step
    eta: float
    seconds: float | None = None
    detail: str = ""


Listener = Callable[[Report], None]


@dataclass
class Progress:
    """Runs through planned steps in order. ETA is the guessed cost of what remains, scaled by how the guesses did so far."""

    steps: list[Step]
    listen: Listener
    timings: dict[str, float] = field(default_factory=dict)
    _running: Report | None = None
    _done: int = 0
    _spent: float = 0.0
    _guessed: float = 0.0

    @contextmanager
    def step(self, submodel: str, stage: str) -> Iterator[list[str]]:
        """Do one step; append to the list what there is to say about it."""
        step = next(s for s in self.steps if (s.submodel, s.stage) == (submodel, stage))
        number, notes = self._done + 1, list[str]()
        self._running = Report(number, len(self.steps), step, self._eta())
        self.listen(self._running)
        start = time.perf_counter()
        yield notes
        seconds = time.perf_counter() - start
        self._done, self._spent, self._guessed = number, self._spent + seconds, self._guessed + step.cost
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds
        self.listen(Report(number, len(self.steps), step, self._eta(), seconds, ", ".join(notes)))

    def note(self, what: str, number: int, total: int) -> None:
        """The step that runs is at `what` number `number`, from 1, of `total`."""
        assert self._running is not None, "told inside a step"
        self.listen(replace(self._running, detail=f"{what} {number} of {total}"))

    def _eta(self) -> float:
        pace = self._spent / self._guessed if self._guessed else 1.0
        return (sum(step.cost for step in self.steps) - self._guessed) * pace
