"""Loads one submodel: the bundle's engine at the first place of its placement where loading succeeds, or one compiled
here (`runtime.placing.portable`). Notes report the failures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from runtime.bundle.manifest import Bundle, Submodel
from runtime.engine import Engine, Options, target
from runtime.errors import EngineError, EngineUnavailable, MissingDependency, ResourceExhausted
from runtime.placing import heap
from runtime.placing.decided import Decided
from runtime.placing.offload import Budget, OffloadedEngine
from runtime.placing.placement import Place
from runtime.placing.portable import Fitted, fitting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submodels:
    """The submodels of a bundle and where they are to run. Under a `budget` their engines take turns in memory;
    `strict` refuses engines that run a part elsewhere.
    """

    bundle: Bundle
    decided: Decided
    budget: Budget | None = None
    strict: bool = False
    _fitted: dict[tuple[str, Place], Fitted] = field(default_factory=dict)

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a submodel may be loaded, in order of preference."""
        return self.decided.plan.choices[name].places

    def decide(self) -> None:
        """Time the choices of all submodels that are still open (`Engine.decide`), while nothing else runs. What fails
        now is told when the submodel is loaded.
        """
        for submodel in self.bundle.manifest.submodels:
            place = self.places(submodel.name)[0]
            engine = target(place.target)
            if engine.choices:
                with suppress(EngineError, ResourceExhausted, MissingDependency):
                    fitted = self._fitted[submodel.name, place] = self._fit(submodel, place)
                    engine.decide(submodel, self.bundle.root, self._options(place, fitted))

    def load(self, name: str, notes: list[str]) -> tuple[Place, Engine]:
        """Load a submodel at the first place where that succeeds. The errors of earlier places are noted.

        Raises EngineError, ResourceExhausted, MissingDependency, BundleError.
        """
        submodel, places, reasons = self.bundle.submodel(name), self.places(name), list[str]()
        for place in places:
            try:
                engine = self._at(submodel, place, notes)
            except (EngineError, ResourceExhausted, MissingDependency) as error:
                if len(places) == 1:
                    raise
                reasons.append(f"{place}: {error}")
                continue
            if reasons:
                notes.append(f"{name} is on {place} since it could not be loaded elsewhere ({'; '.join(reasons)})")
            return place, self._strictly(engine)
        raise EngineUnavailable(f"{name} could be loaded nowhere. {'; '.join(reasons)}")

    def _strictly(self, engine: Engine) -> Engine:
        if not self.strict or not engine.fallbacks:
            return engine
        engine.close()
        raise EngineError(
            f"{engine.submodel.name} on {engine.device} runs a part elsewhere: {'; '.join(engine.fallbacks)}. Choose "
            "another target or device, or allow that by leaving out --strict"
        )

    def _at(self, submodel: Submodel, place: Place, notes: list[str]) -> Engine:
        load = partial(self._load, submodel, place, notes)
        if self.budget is None:
            return load()
        return _held(submodel, place, self.decided.plan.choices[submodel.name].estimated[place], self.budget, load)

    def _load(self, submodel: Submodel, place: Place, notes: list[str]) -> Engine:
        """Load the bundle's engine for the target, or compile one if none fits this machine, which is noted.

        Files are verified before and after: engines open them by name, perhaps long after the bundle was verified.
        """
        self.bundle.verify_again()
        fitted = self._fitted.pop((submodel.name, place), None) or self._fit(submodel, place)
        if fitted.note and fitted.note not in notes:
            notes.append(fitted.note)
        loaded = target(place.target).load(submodel, self.bundle.root, self._options(place, fitted))
        heap.give_back()  # memory that loading used and freed is not the engine's
        try:
            self.bundle.verify_again()
        except BaseException:
            loaded.close()
            raise
        self.decided.tell(loaded, submodel, place)
        return loaded

    def _fit(self, submodel: Submodel, place: Place) -> Fitted:
        progress = _ProgressLog(f"{place.target} {submodel.name}")
        return fitting(self.bundle, submodel, target(place.target), progress)

    def _options(self, place: Place, fitted: Fitted) -> Options:
        return replace(self.decided.at(place), compiled=fitted.compiled)


class _ProgressLog:
    """Logs the progress of a compilation: each new phase, and each further tenth of it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last: tuple[str, int] | None = None

    def __call__(self, share: float, phase: str) -> None:
        now = phase, int(10 * share)
        if now != self.last:
            self.last = now
            log.info("compiling %s: %.0f %%, %s", self.what, 100 * share, phase)


def _held(submodel: Submodel, place: Place, estimated: int, budget: Budget, load: Callable[[], Engine]) -> Engine:
    """An engine that can be unloaded for others. It is loaded once now, so that errors appear early and its memory is
    measured.
    """
    engine = OffloadedEngine(submodel, place.target, place.memory, budget, estimated, load)
    try:
        engine.measure(place.memory == "cpu")
    except BaseException:
        engine.close()
        raise
    return engine
