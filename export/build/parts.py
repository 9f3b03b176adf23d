"""The parts of a model, from its config files alone: made without weights, traced, and proven on their twins."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

import export.graph.trace
from calibration.ground import machine
from export.architecture.adapters import Adapters
from export.architecture.twin import twin_weights
from export.build.keys import code
from export.build.staging import cached, key_of
from export.checkpoint.additions import KINDS
from export.checkpoint.component import fingerprint_of
from export.checkpoint.source import Source
from export.checks import parity
from export.family import Family, Part
from export.graph import weights as graph
from runtime.bundle.manifest import Parity
from runtime.errors import EnginecastError, SourceError

TOOLS: Final = ("enginecast", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
"""Packages that make graphs and run the float model. What targets and recipes need besides, they declare themselves."""


def library_parts(source: Source, family: Family) -> list[Part]:
    """The parts as the libraries make them from the config files, without weights. Raises SourceError where those
    describe no such model, InvalidInput for an addition that the family does not take.
    """
    family.check_additions(source)
    try:
        for look in (family.assets, family.notes):
            look(source)  # what the small files say is refused before anything is made of it
        return parts_of(source, family)
    except (EnginecastError, AssertionError):
        raise
    except Exception as error:  # the libraries check configs with exceptions of every kind
        missing = isinstance(error, KeyError)  # whose text is the key alone
        reason = f"the library knows no {error}" if missing else " ".join(str(error).split())
        raise SourceError(
            f"{source.root}: its config files do not describe a {source.architecture} the libraries can make "
            f"({type(error).__name__}: {reason}). Correct them, or take them as they were published"
        ) from error


def parts_of(source: Source, family: Family, reduced: bool = False) -> list[Part]:
    """The parts as the family makes them, with the branches of the LoRA files that requests choose from. `reduced` is
    as in `Family.parts`.
    """
    whole = family.parts(source, False)
    adapters = Adapters.of(source, whole)
    return adapters.applied(family.parts(source, True) if reduced else whole)


def traced(source: Source, part: Part, tools: Mapping[str, str]) -> Path:
    """The file of the part's graph without weights. Tracing is what takes long, so it is kept for the next build with
    the same `tools` and additions, whose scales and layers are constants of a part's module. Parts of one architecture,
    such as two control networks, have one graph.
    """
    added = [(one.kind, one.name, one.scale, fingerprint_of(one)) for one in source.additions if KINDS[one.kind].traced]
    configs = [_config_of(component.model) for component in part.components]
    shapes = {name: list(one.shape) for name, one in part.module.named_parameters(remove_duplicate=False)}
    module = f"{type(part.module).__module__}.{type(part.module).__qualname__}"
    key = key_of("graph", module, configs, shapes, part.signature.model_dump(), tools, added, code())
    return cached(
        key, ".onnx", lambda path: graph.save_traced(export.graph.trace.trace(part.module, part.signature), path)
    )


def twin_parity(family: Family, source: Source, name: str, tools: Mapping[str, str]) -> Parity:
    """How near the graph of a part with fewer layers and random weights is to the library's own model. Raises
    ParityError.
    """
    twin = next(part for part in parts_of(source, family, reduced=True) if part.name == name)
    with twin_weights(twin) as weights:
        model = ir.load(traced(source, twin, tools))
        graph.attach(model, twin.parameters(), weights)
        return parity.check(twin, model, weights, "twin")


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {name: machine.version(name) for name in dict.fromkeys(packages)}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def _config_of(model: Any) -> dict[str, Any]:
    """The settings that a library's model was made from, but for where it lay; a module of ours has none."""
    found = getattr(model, "config", {})
    settings = found.to_dict() if hasattr(found, "to_dict") else dict(found)
    return {name: value for name, value in settings.items() if name != "_name_or_path"}
