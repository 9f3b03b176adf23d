"""Whether calls of several requests are made as one with more rows: where that was measured to pay, by
`enginecast tune` or while serving.

A call that keeps the device busy takes twice as long with twice the rows; joining it gains nothing but a longer wait
for the others. So only short calls are tried: two together, once to warm up and once measured. Where the engine's
`timed` calls say how many are best made as one, nothing is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from runtime.engine import Engine
from runtime.kept import Kept
from runtime.stacking import GAIN, Inputs, Rows, best
from serving.host.run import Run

log = logging.getLogger(__name__)

LONG: Final = 0.25
"""Seconds of a call that is too long to be tried."""
TRIALS: Final = 3
"""How often calls are made alone before two are tried together, and how often these are tried.

The shortest times count: others were disturbed, and an engine may prepare for more rows at first.
"""
KINDS: Final = 64
"""Kinds of calls, by submodel and shapes, whose measurements are held: those that were made last."""

Kind = tuple[object, ...]


@dataclass
class _Measured:
    """Seconds of the shortest single call and their number, and seconds of two calls together. `most` is the number of
    calls that are best made as one where that was measured before, else None.
    """

    alone: float = inf
    calls: int = 0
    together: list[float] = field(default_factory=list)
    most: int | None = None

    @property
    def tried(self) -> bool:
        return self.most is not None or len(self.together) >= TRIALS

    @property
    def worth_trying(self) -> bool:
        return not self.tried and self.calls >= TRIALS and self.alone < LONG

    @property
    def pays(self) -> bool:
        if self.most is not None:
            return self.most > 1
        return self.tried and min(self.together) < GAIN * 2 * self.alone


class Joining:
    """What was measured of the calls of one model."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._kinds = Kept[Kind, _Measured](KINDS)

    def joined(self, engine: Engine, runs: Sequence[Run]) -> Sequence[Run]:
        """The requests whose calls are made together, of those that wait for a submodel without states: the first one,
        and those that join it.
        """
        inputs = _inputs(runs[0])
        if len(runs) < 2 or not engine.joins(inputs):
            return runs[:1]
        measured, rows = self._measured(engine, inputs), Rows.of(engine.submodel.signature)
        if rows is None or not (measured.pays or measured.worth_trying):
            return runs[:1]
        found, room = [runs[0]], rows.most - rows.count(inputs)
        for run in runs[1:]:
            count = rows.count(_inputs(run))
            if count <= room and rows.stackable(inputs, _inputs(run)):
                found.append(run)
                room -= count
                if not measured.pays or len(found) == measured.most:
                    break
        return found

    def note(self, engine: Engine, inputs: Inputs, calls: int, seconds: float) -> None:
        """Learn from a run of so many calls like this one."""
        measured = self._measured(engine, inputs)
        if calls == 1:
            measured.alone, measured.calls = min(measured.alone, seconds), measured.calls + 1
        elif not measured.tried:
            measured.together.append(seconds)
            if measured.tried:
                does = "are joined" if measured.pays else "take turns"
                both, one = 1000 * min(measured.together), 1000 * measured.alone
                log.info(
                    "model %s: calls of %s %s: two take %.1f ms together, one takes %.1f ms",
                    *(self._name, engine.submodel.name, does, both, one),
                )

    def refuse(self, engine: Engine, inputs: Inputs) -> None:
        """The engine cannot run calls like this one together."""
        measured = self._measured(engine, inputs)
        measured.together, measured.most = [inf] * TRIALS, None

    def _measured(self, engine: Engine, inputs: Inputs) -> _Measured:
        kind = engine.submodel.name, *(array.shape for array in inputs.values())
        measured = self._kinds.get(kind)
        if measured is None:
            self._kinds.put(kind, measured := _Measured(most=self._known(engine, inputs)), 1)
        return measured

    def _known(self, engine: Engine, inputs: Inputs) -> int | None:
        """How many calls like this one are best made as one, where that was measured before."""
        rows = Rows.of(engine.submodel.signature) if engine.timed else None
        times = rows.together(engine.timed, {name: array.shape for name, array in inputs.items()}) if rows else {}
        if 1 not in times or len(times) < 2:
            return None
        shown = ", ".join(f"{count} take {1000 * seconds:.1f} ms" for count, seconds in sorted(times.items()))
        log.info(
            "model %s: at most %d calls of %s are joined: %s", self._name, best(times), engine.submodel.name, shown
        )
        return best(times)


def _inputs(run: Run) -> Inputs:
    assert run.call is not None, "it waits for a call"
    return run.call.inputs
