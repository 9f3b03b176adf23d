"""Loads a bundle: each submodel at the first place of its placement where loading succeeds. Notes report the failures.

Submodels without an engine for this machine are compiled here (`runtime.placing.portable`). Under a memory limit the
engines share a `Budget` (`runtime.placing.offload`), and pictures that do not fit are decoded in tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.signature import nbytes
from runtime.bundle.signing import require_signature
from runtime.engine import Engine, Options, target
from runtime.errors import (
    BundleError,
    EngineError,
    EngineUnavailable,
    MissingDependency,
    ResourceExhausted,
    did_you_mean,
    quoted,
)
from runtime.pipeline import ModelPipeline, Pipeline, Room, pipelines
from runtime.placing import heap, memory, placement
from runtime.placing.decided import Decided
from runtime.placing.devices import detect
from runtime.placing.offload import Budget, OffloadedEngine
from runtime.placing.placement import Candidates, Place, PlacementOptions
from runtime.placing.portable import fitting
from runtime.placing.variants import Chosen, chosen
from runtime.scripting import Scripts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: its engines by submodel name, and the pipeline that calls them.

    `places` is where each submodel was loaded. `notes` lists differences from the published model (`Manifest.notes`)
    and from the requested placement. `again` loads the model once more, without some places.
    """

    bundle: Bundle
    task: str
    target: str
    device: str
    engines: Mapping[str, Engine]
    pipeline: Callable[[Any], Pipeline]
    places: Mapping[str, Place] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    again: Callable[[Collection[Place]], LoadedModel] | None = None

    def close(self) -> None:
        """Free every engine. Errors are ignored: a lost device cannot free its memory."""
        for name, engine in self.engines.items():
            with suppress(EngineError):
                log.debug("closing %s", name)
                engine.close()

    def broken(self) -> tuple[str, ...]:
        """Submodels whose engines fail on a small sample, as they do after their device was lost."""
        return tuple(name for name, engine in self.engines.items() if not _works(engine))

    def elsewhere(self, broken: Collection[str]) -> LoadedModel:
        """Close this model and load it again, avoiding the places of the broken submodels. Raises the errors of
        `load_model`.
        """
        self.close()
        assert self.again is not None, "a model that was loaded can be loaded again"
        return self.again([self.places[name] for name in broken])


def choose_target(bundle: Bundle, wanted: str | None = None) -> type[Engine]:
    """The wanted target, or the bundle's first usable one. Raises EngineUnavailable with the reason of every target: a
    wanted target is never replaced by another.
    """
    machine = detect()
    return target(
        placement.usable(bundle, placement.order(bundle, wanted, PlacementOptions(), machine), "", machine)[0].target
    )


def load_model(
    bundle: Path | Bundle | Chosen,
    wanted: str | None = None,
    options: Options | None = None,
    placing: PlacementOptions | None = None,
    public: Path | None = None,
    request: Any = None,
    scripts: Scripts | None = None,
) -> LoadedModel:
    """Verify a bundle's files by their hashes and load its submodels, on the `wanted` target or as `placing` says. Of a
    folder with several bundles of one model one is chosen (`runtime.placing.variants`).

    The manifest of a `Bundle` that was opened or `Chosen` before must not have changed since. With the file of a
    `public` key, the bundle must be signed with its private key. A `request` is checked before any engine is loaded.
    The installed `scripts` are told of the model.

    Hashing reads every byte once, about 2 GB a second, before native code reads the files. Files that change during
    loading are refused. Raises NotFound, BundleError, InvalidInput, ResourceExhausted or EngineError; nothing stays
    loaded then.
    """
    if isinstance(bundle, Path):
        bundle = chosen(bundle, wanted, placing)
    found = Chosen(bundle) if isinstance(bundle, Bundle) else bundle
    return _load(
        found, wanted, options or Options(), placing or PlacementOptions(), public, scripts or Scripts(), (), request
    )


def _verify(bundle: Bundle, public: Path | None) -> None:
    """Raise BundleError unless every file that loading opens is in the manifest and has the hash listed there."""
    if public is None:
        bundle.verify(unknown=False)
    else:
        require_signature(bundle, public)
    manifest = bundle.manifest
    if manifest.pipeline not in pipelines():
        raise BundleError(
            f"bundle {bundle.name} needs the pipeline {quoted(manifest.pipeline)}, which this program lacks: "
            f"{did_you_mean(manifest.pipeline, pipelines())}"
        )
    does = pipelines()[manifest.pipeline].task
    if manifest.task != does:
        raise BundleError(
            f"bundle {bundle.name} has the task {quoted(manifest.task)}, but its pipeline {quoted(manifest.pipeline)} "
            f"is of the task {quoted(does)}: build it again"
        )


def _load(
    found: Chosen,
    wanted: str | None,
    options: Options,
    placing: PlacementOptions,
    public: Path | None,
    scripts: Scripts,
    avoid: Collection[Place],
    request: Any = None,
) -> LoadedModel:
    bundle = found.bundle
    _verify(bundle, public)
    options = replace(options, verify=bundle.verify_again)
    pipeline = open_pipeline(bundle)
    if request is not None:
        scripts.open(pipeline, request).close()
    machine = detect()
    plan = placement.place(bundle, wanted, options.device, placing, machine, avoid)
    budget = Budget(plan.rooms) if plan.rooms else None
    pipeline.remember(_kept(bundle, placing, budget))
    engines, places, notes = dict[str, Engine](), dict[str, Place](), [*bundle.manifest.notes, *plan.notes]
    try:
        for submodel in bundle.manifest.submodels:
            choice = plan.choices[submodel.name]
            where, engine = _first(
                submodel,
                choice,
                partial(_load_one, bundle, submodel, Decided(options, plan, machine, found.decision), notes),
                budget,
                notes,
            )
            engines[submodel.name], places[submodel.name] = engine, where
            if placing.strict and engine.fallbacks:
                raise EngineError(
                    f"{submodel.name} on {engine.device} runs a part elsewhere: {'; '.join(engine.fallbacks)}. Choose "
                    "another target or device, or allow that by leaving out --strict"
                )
        notes += pipeline.keep_within(_room(engines, budget))
    except BaseException:
        for one in engines.values():
            one.close()
        raise
    for note in notes:
        log.info("model %s: %s", bundle.name, note)
    names, devices = (
        ", ".join(dict.fromkeys(getattr(one, name) for one in engines.values())) for name in ("target", "device")
    )
    again = partial(_load, found, wanted, options, placing, public, scripts)
    loaded = LoadedModel(bundle, bundle.manifest.task, names, devices, engines, pipeline, places, tuple(notes), again)
    return _told(loaded, scripts)


def _told(model: LoadedModel, scripts: Scripts) -> LoadedModel:
    """The model with the notes of scripts on it. It is closed if one of them fails."""
    try:
        return replace(model, notes=(*model.notes, *scripts.loaded(model)))
    except BaseException:
        model.close()
        raise


def open_pipeline(bundle: Bundle) -> ModelPipeline:
    """The pipeline of a bundle, without engines. Raises BundleError when its settings or files do not fit."""
    try:
        return pipelines()[bundle.manifest.pipeline].open(bundle.root, bundle.manifest.config)
    except BundleError as error:
        raise BundleError(f"bundle {bundle.name} cannot be used: {error}. Build it again with this version") from None


def _first(
    submodel: Submodel, candidates: Candidates, load: Callable[[Place], Engine], budget: Budget | None, notes: list[str]
) -> tuple[Place, Engine]:
    """Load the submodel at the first place where that succeeds. The errors of earlier places are noted."""
    reasons = []
    for place in candidates.places:
        try:
            engine = _held(submodel, place, candidates.estimated[place], budget, load) if budget else load(place)
        except (EngineError, ResourceExhausted, MissingDependency) as error:
            if len(candidates.places) == 1:
                raise
            reasons.append(f"{place}: {error}")
            continue
        if reasons:
            notes.append(f"{submodel.name} is on {place} since it could not be loaded elsewhere ({'; '.join(reasons)})")
        return place, engine
    raise EngineUnavailable(f"{submodel.name} could be loaded nowhere. {'; '.join(reasons)}")


def _load_one(bundle: Bundle, submodel: Submodel, decided: Decided, notes: list[str], place: Place) -> Engine:
    """Load the bundle's engine for the target, or compile one if none fits this machine, which is noted.

    Files are verified before and after: engines open them by name, perhaps long after the bundle was verified.
    """
    bundle.verify_again()
    engine = target(place.target)
    fitted = fitting(bundle, submodel, engine, _ProgressLog(f"{place.target} {submodel.name}"))
    if fitted.note and fitted.note not in notes:
        notes.append(fitted.note)
    loaded = engine.load(submodel, bundle.root, replace(decided.at(place), compiled=fitted.compiled))
    heap.give_back()  # memory that loading used and freed is not the engine's
    try:
        bundle.verify_again()
    except BaseException:
        loaded.close()
        raise
    decided.tell(loaded, submodel, place)
    return loaded


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


def _held(submodel: Submodel, place: Place, estimated: int, budget: Budget, load: Callable[[Place], Engine]) -> Engine:
    """An engine that can be unloaded for others. It is loaded once now, so that errors appear early and its memory is
    measured.
    """
    engine = OffloadedEngine(submodel, place.target, place.memory, budget, estimated, partial(load, place))
    try:
        engine.measure(place.memory == "cpu")
    except BaseException:
        engine.close()
        raise
    return engine


def _kept(bundle: Bundle, placing: PlacementOptions, budget: Budget | None) -> Room:
    """The memory for what requests may use again. Under a budget none of it is for prefixes: an engine that holds them
    could not make room for others.
    """
    signatures = [submodel.signature for submodel in bundle.manifest.submodels]
    position = sum(
        nbytes((state.past for state in one.states), one.complete(one.decoder.lengths(1, 1)))
        for one in signatures
        if one.states
    )
    return Room(placing.picture_cache, 0 if budget else placing.prefix_cache, position)


def _room(engines: Mapping[str, Engine], budget: Budget | None) -> dict[str, float]:
    """The largest inputs of one call in bytes, for each submodel in a memory with a limit."""
    rooms = budget.rooms if budget else {}
    return {
        name: engine.need.inputs_within(rooms[engine.memory])
        for name, engine in engines.items()
        if isinstance(engine, OffloadedEngine) and engine.memory in rooms
    }


def _works(engine: Engine) -> bool:
    try:
        engine.run(memory.sample(engine.submodel.signature))
    except ResourceExhausted:
        return True  # the memory may be free later
    except Exception as error:
        log.info("%s on %s cannot run a sample: %s", engine.submodel.name, engine.device, error)
        return False
    return True
