"""From a bundle on disk to a model that runs: which target, on which device, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.bundle import Bundle
from runtime.engine import Engine, Options, target, targets
from runtime.errors import BundleError, EngineUnavailable, did_you_mean
from runtime.pipeline import Pipeline
from runtime.pipelines.chat import ChatPipeline
from runtime.pipelines.diffusion import DiffusionPipeline

PIPELINES: Mapping[str, Callable[[Bundle], Callable[..., Pipeline]]] = {"diffusion": DiffusionPipeline.from_bundle, "chat": ChatPipeline}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: its engines by submodel name, and the pipeline that calls them."""

    bundle: Bundle
    kind: Literal["diffusion", "chat"]
    target: str
    device: str
    engines: Mapping[str, Engine]
    pipeline: Callable[[Any], Pipeline]

    def close(self) -> None:
        """Free every engine."""
        for engine in self.engines.values():
            engine.close()


def choose_target(bundle: Bundle, wanted: str | None = None) -> type[Engine]:
    """The wanted target, or the best usable one the bundle was built for.

    Raises EngineUnavailable listing what is wrong with every one: a target is never replaced by another without a word.
    """
    if wanted is not None:
        target(wanted)
        if wanted not in bundle.targets:
            built = ", ".join(bundle.targets)
            raise EngineUnavailable(f"bundle {bundle.name} was built for {built}, not for {wanted}: build it with --target {wanted}")
    reasons = []
    asked = (wanted,) if wanted else bundle.targets
    for name, engine in targets().items():
        if name not in asked:
            continue
        found = engine.available()
        if found.usable:
            return engine
        reasons.append(f"{name}: {found.reason}")
    reasons += [f"{name}: not known to this program" for name in asked if name not in targets()]
    raise EngineUnavailable(f"no target of bundle {bundle.name} is usable here. {'; '.join(reasons) or 'It was built for none'}")


def load_model(root: Path, wanted: str | None = None, options: Options | None = None) -> LoadedModel:
    """Open a bundle, compare its files with their hashes, and load all its submodels on one target.

    Hashing reads every byte once, some 2 GB a second, before any of it is handed to native code. Raises NotFound, BundleError or
    EngineError; leaves nothing loaded then.
    """
    bundle = Bundle(root)
    bundle.verify(strangers=False)
    kind = bundle.manifest.pipeline
    if kind not in PIPELINES:
        raise BundleError(f"bundle {bundle.name} needs the pipeline '{kind}', which this program lacks: {did_you_mean(kind, PIPELINES)}")
    pipeline = PIPELINES[kind](bundle)
    engine = choose_target(bundle, wanted)
    loaded: dict[str, Engine] = {}
    try:
        for submodel in bundle.manifest.submodels:
            loaded[submodel.name] = engine.load(submodel, root, options or Options())
    except BaseException:
        for one in loaded.values():
            one.close()
        raise
    devices = ", ".join(dict.fromkeys(one.device for one in loaded.values()))
    return LoadedModel(bundle, kind, engine.target, devices, loaded, pipeline)  # type: ignore[arg-type]
