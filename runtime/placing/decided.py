"""What is decided of each engine when it is loaded: by the user, else by measured figures, else as ever."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from runtime.bundle.manifest import Submodel
from runtime.engine import Engine, Options
from runtime.placing.choices import Decision
from runtime.placing.containers import Allowance
from runtime.placing.devices import Machine
from runtime.placing.placement import Place, Placement
from runtime.stacking import Timed


@dataclass(frozen=True)
class Decided:
    """The options of engines, and what measured figures (`Placement.advice`) decide where these leave it open. `bundle`
    says why it is this bundle, where there were several.
    """

    options: Options
    plan: Placement
    machine: Machine
    bundle: Decision | None = None

    def at(self, place: Place) -> Options:
        """The options of an engine at this place."""
        decided = self._engine(place).get("threads")
        threads = self.options.threads or (int(decided.value) if decided else _threads(self.machine.allowed))
        return replace(self.options, device=place.device, threads=threads)

    def of(self, submodel: Submodel, place: Place) -> dict[str, Decision]:
        """What figures decided of a submodel at this place."""
        joined = self.plan.advice.joined(submodel, self.timed(submodel, place))
        return self._engine(place) | ({"joined": joined} if joined else {})

    def timed(self, submodel: Submodel, place: Place) -> tuple[Timed, ...]:
        """The calls of a submodel that were timed with the threads that it has at this place."""
        threads = self.at(place).threads or self.machine.allowed.threads
        return self.plan.advice.calls(submodel, place.target, threads)

    def tell(self, engine: Engine, submodel: Submodel, place: Place) -> None:
        """Give a submodel's loaded engine the decisions, for display, and the calls that were timed."""
        engine.timed = self.timed(submodel, place)
        if found := self.of(submodel, place):
            engine.decisions = {**engine.decisions, **found}

    def _engine(self, place: Place) -> dict[str, Decision]:
        advice, targets = self.plan.advice, self.plan.targets
        target = advice.target(place.target, targets) if len(targets) > 1 else None
        threads = None if self.options.threads else advice.threads(place.target)
        return {name: one for name, one in (("bundle", self.bundle), ("target", target), ("threads", threads)) if one}


def _threads(allowed: Allowance) -> int:
    """Threads for SDKs if this process may use only some of the processors, else 0 for all: SDKs count the processors
    of the whole machine.
    """
    return allowed.threads if allowed.cpus < (os.cpu_count() or 1) else 0
