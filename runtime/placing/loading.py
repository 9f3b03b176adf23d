"""Loads a bundle: its submodels (`runtime.placing.submodels`) one after another, before or while requests run.

Under a memory limit the engines share a `Budget` (`runtime.placing.offload`), and pictures that do not fit are decoded
in tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import nbytes
from runtime.bundle.signing import require_signature
from runtime.engine import Engine, Options, target
from runtime.errors import BundleError, EngineError, ResourceExhausted, did_you_mean, quoted
from runtime.pipeline import ModelPipeline, Pipeline, Room, pipelines
from runtime.placing import memory, placement
from runtime.placing.arriving import Arriving, here
from runtime.placing.decided import Decided
from runtime.placing.devices import detect
from runtime.placing.offload import Budget, OffloadedEngine
from runtime.placing.placement import Place, PlacementOptions
from runtime.placing.submodels import Submodels
from runtime.placing.variants import Chosen, chosen
from runtime.scripting import Scripts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: its engines by submodel name, and the pipeline that calls them.

    `places` is where each submodel was loaded. `notes` lists differences from the published model (`Manifest.notes`)
    and from the requested placement. `again` loads the model once more, without some places.

    Of a model that was begun (`begin_model`), `rest` loads the engines one after another and returns the whole model.
    Calls wait for them meanwhile; `target` names what is planned, `device` is empty, and `notes` grow. Where `rest`
    fails, waiting calls get its error, and the owner closes the model.
    """

    bundle: Bundle
    task: str
    target: str
    device: str
    engines: Mapping[str, Engine]
    pipeline: Callable[[Any], Pipeline]
    places: Mapping[str, Place] = field(default_factory=dict)
    notes: Sequence[str] = ()
    again: Callable[[Collection[Place]], LoadedModel] | None = None
    rest: Callable[[], LoadedModel] | None = None

    def close(self) -> None:
        """Free every engine. Errors are ignored: a lost device cannot free its memory. One that is being loaded is
        freed when it is there.
        """
        if isinstance(self.engines, Arriving):
            self.engines.close()
        for name, engine in here(self.engines).items():
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
    return whole(begin_model(bundle, wanted, options, placing, public, request, scripts))


def begin_model(
    bundle: Path | Bundle | Chosen,
    wanted: str | None = None,
    options: Options | None = None,
    placing: PlacementOptions | None = None,
    public: Path | None = None,
    request: Any = None,
    scripts: Scripts | None = None,
) -> LoadedModel:
    """`load_model` up to what takes long: the files are verified, the places chosen, and choices that are timed are
    decided. Requests may begin: their calls wait until `LoadedModel.rest`, in another thread, has loaded the engine.

    The whole model is returned at once where its submodels share a memory limit, or may run nowhere but on their
    device.
    """
    if isinstance(bundle, Path):
        bundle = chosen(bundle, wanted, placing)
    found = Chosen(bundle) if isinstance(bundle, Bundle) else bundle
    return _begin(
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


def _begin(
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
    submodels = Submodels(bundle, Decided(options, plan, machine, found.decision), budget, placing.strict)
    engines = Arriving([submodel.name for submodel in bundle.manifest.submodels])
    again = partial(_elsewhere, found, wanted, options, placing, public, scripts)
    notes = [*bundle.manifest.notes, *plan.notes]
    targets = ", ".join(dict.fromkeys(submodels.places(name)[0].target for name in engines))
    begun = LoadedModel(bundle, bundle.manifest.task, targets, "", engines, pipeline, {}, notes, again)
    begun = replace(begun, rest=partial(_rest, begun, pipeline, submodels, scripts))
    if budget is not None or placing.strict:
        return whole(begun)
    submodels.decide()
    return begun


def _rest(begun: LoadedModel, pipeline: ModelPipeline, submodels: Submodels, scripts: Scripts) -> LoadedModel:
    """Load the engines of a model that has none yet."""
    engines, notes, places = begun.engines, begun.notes, dict[str, Place]()
    assert isinstance(engines, Arriving) and isinstance(notes, list), "as _begin makes it"
    try:
        while (name := engines.following()) is not None:
            places[name], engine = submodels.load(name, notes)
            engines.put(name, engine)
        notes += pipeline.keep_within(_room(engines, submodels.budget))
        for note in notes:
            log.info("model %s: %s", begun.bundle.name, note)
        names, devices = (
            ", ".join(dict.fromkeys(getattr(one, name) for one in engines.values())) for name in ("target", "device")
        )
        loaded = replace(begun, target=names, device=devices, places=places, notes=tuple(notes), rest=None)
        return replace(loaded, notes=(*notes, *scripts.loaded(loaded)))
    except BaseException as error:
        engines.fail(error)
        raise


def whole(model: LoadedModel) -> LoadedModel:
    """The model with all its engines, loaded now if they are not there. It is closed if that fails, with the errors of
    `load_model`.
    """
    if model.rest is None:
        return model
    try:
        return model.rest()
    except BaseException:
        model.close()
        raise


def _elsewhere(
    found: Chosen,
    wanted: str | None,
    options: Options,
    placing: PlacementOptions,
    public: Path | None,
    scripts: Scripts,
    avoid: Collection[Place],
) -> LoadedModel:
    return whole(_begin(found, wanted, options, placing, public, scripts, avoid))


def open_pipeline(bundle: Bundle) -> ModelPipeline:
    """The pipeline of a bundle, without engines. Raises BundleError when its settings or files do not fit."""
    try:
        return pipelines()[bundle.manifest.pipeline].open(bundle.root, bundle.manifest.config)
    except BundleError as error:
        raise BundleError(f"bundle {bundle.name} cannot be used: {error}. Build it again with this version") from None


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
