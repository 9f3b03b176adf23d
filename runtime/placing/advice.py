"""What measured figures (`runtime.placing.nearest`) advise for a bundle: the order of targets, threads, and how many
calls are made as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from runtime.bundle.manifest import Manifest, Submodel
from runtime.placing.choices import Decision
from runtime.placing.devices import Machine
from runtime.placing.measured import Collected, Row
from runtime.placing.nearest import Near, Profile, near_rows, profiles, shapes_of
from runtime.stacking import Rows, Timed, best

MARGIN: Final = 0.05
"""Share of the time that other threads must save."""


@dataclass(frozen=True)
class Advice:
    """What the nearest figures of a bundle say. `faults` are sentences on rows that could not be read."""

    quant: str = ""
    profiles: tuple[Profile, ...] = ()
    faults: tuple[str, ...] = ()
    threads_here: int = 1
    _calls: Sequence[tuple[Near, Row]] = field(default=(), repr=False)

    def order(self, names: Sequence[str]) -> list[str]:
        """The targets, those with figures sorted among themselves, the fastest first. The others keep their
        positions.
        """
        figures = self._targets(names)[1]
        measured = iter(figures)
        return [str(next(measured)) if name in figures else name for name in names]

    def target(self, name: str, names: Sequence[str]) -> Decision | None:
        """Why this target comes where it does among these; None where no figures say so."""
        profile, figures = self._targets(names)
        if profile is None or name not in figures:
            return None
        own = figures[name]
        slower = {other: seconds for other, seconds in figures.items() if seconds >= own and other != name}
        shown = slower or {other: seconds for other, seconds in figures.items() if other != name}
        word, others = "before" if slower else "behind", ", ".join(map(str, shown))
        against = ", ".join(f"{seconds:.3g}" for seconds in shown.values())
        return Decision(name, f"{word} {others}: measured {own:.3g} against {against} s {profile.source}")

    def threads(self, target: str) -> Decision | None:
        """Fewer threads than this process may use, where that was measured to be faster; else None."""
        for profile in self.profiles:
            mine = profile.only(
                lambda one: (one.quant, one.target) == (self.quant, target) and one.threads <= self.threads_here
            ).fastest(lambda one: one.threads)
            if self.threads_here in mine and len(mine) > 1:
                (best, least), usual = next(iter(mine.items())), mine[self.threads_here]
                if best == self.threads_here or least > (1 - MARGIN) * usual:
                    return None
                return Decision(
                    str(best),
                    f"measured {least:.3g} s against {usual:.3g} s with {self.threads_here} threads {profile.source}",
                )
        return None

    def calls(self, submodel: Submodel, target: str, threads: int) -> tuple[Timed, ...]:
        """Timed calls of a submodel with so many threads, of the nearest device and model that have any; the newest of
        each shape.
        """
        fitting = [
            (near, row)
            for near, row in self._calls
            if (row.metric, row.target, row.threads) == (submodel.name, target, threads)
        ]
        nearest = min((near for near, _ in fitting), default=None)
        rows, newest = Rows.of(submodel.signature), dict[object, Timed]()
        for near, row in sorted(fitting, key=lambda item: item[1].date):
            shapes = shapes_of(row)
            if near == nearest and rows and shapes and shapes.get(rows.rowed[0], ())[:1] > (0,):
                newest[tuple(sorted(shapes.items()))] = Timed(
                    shapes, row.spread.median, f"{near.words}, {row.date:%Y-%m-%d}"
                )
        return tuple(newest.values())

    def joined(self, submodel: Submodel, calls: Sequence[Timed]) -> Decision | None:
        """How many calls of a submodel are made as one, for the calls with the fewest rows that were timed."""
        rows = Rows.of(submodel.signature)
        if rows is None or not calls:
            return None
        first = min(calls, key=lambda call: call.shapes[rows.rowed[0]])
        times = rows.together(calls, first.shapes)
        if len(times) < 2:
            return None
        shown = ", ".join(f"{count} in {seconds:.3g} s" for count, seconds in sorted(times.items()))
        return Decision(str(best(times)), f"measured calls of {submodel.name} together: {shown}, {first.where}")

    def _targets(self, names: Sequence[str]) -> tuple[Profile | None, dict[str | int, float]]:
        """The nearest profile that compares some of these targets, and their seconds, the fastest first."""
        for profile in self.profiles:
            found = profile.only(lambda one: one.quant == self.quant and one.target in names).fastest(
                lambda one: one.target
            )
            if len(found) > 1:
                return profile, found
        return None, {}


def advise(manifest: Manifest, machine: Machine, collected: Collected) -> Advice:
    """What rows say of a bundle on this machine."""
    rows = list(near_rows([manifest], machine, collected.rows))
    found = tuple(profiles([manifest], rows))
    return Advice(manifest.quant, found, collected.faults, machine.allowed.threads, rows)
