"""What an engine is: named arrays in, named arrays out. One file per target in `runtime/engines/`, found by listing the
folder.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

import runtime.targets
from runtime.bundle.manifest import Artifact, Submodel
from runtime.bundle.signature import Array
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, NotFound, did_you_mean
from runtime.listing import modules
from runtime.placing.choices import Decision
from runtime.settings import Texts


class Slot:
    """The identity of one sequence's states (its KV cache). The engine allocates on first use and frees when the slot
    is gone.
    """


SlotCall = tuple[Mapping[str, Array], Slot | None]
"""The inputs of one call, and the slot whose states it continues."""


@dataclass(frozen=True)
class Availability:
    """Whether a target can run on this machine. `reason` says why not, `devices` which devices it can use, best first.

    `compiles` is True where it cannot run and compiles all the same, ahead of time, for devices of other machines.
    """

    usable: bool
    devices: tuple[str, ...] = ()
    reason: str = ""
    version: str = ""
    compiles: bool = False


@dataclass(frozen=True)
class Compiled:
    """What a target made of a submodel, and the folder that the artifact's files lie in: the bundle's, or one of the
    user's cache.
    """

    artifact: Artifact
    folder: Path

    @classmethod
    def of(cls, root: Path, artifact: Artifact) -> Compiled:
        """An artifact of the bundle at `root`."""
        return cls(artifact, root / "engines" / artifact.target / artifact.folder)


@dataclass(frozen=True)
class Options:
    """How an engine is to be loaded. `threads` 0 means all cores.

    `compiled` is what to load, as `runtime.placing.portable.fitting` found it; without one, it is what the bundle
    holds. `verify` is called before files are read again after the engine was loaded: it raises BundleError where they
    are no longer those that were verified.
    """

    device: str = ""
    threads: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    compiled: Compiled | None = None
    verify: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class CompileOptions:
    """How a target shall compile. `settings` are the target's own, by name; `progress` hears of the share done, from 0
    to 1, and of what.

    What `progress` raises stops the compilation and is raised again.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[float, str], None] = lambda share, phase: None


class Engine(ABC):
    """One submodel, loaded on one device by one target."""

    target: ClassVar[str]
    rank: ClassVar[int]
    """Order of preference among usable targets: lower is tried first."""
    precisions: ClassVar[frozenset[str]] = frozenset({"float32", "int8", "int4"})
    """What it has kernels for: also "float16", "bfloat16", "fp8". What it would emulate is not among them: that is
    slower than float32.
    """
    compile_settings: ClassVar[type[Texts] | None] = None
    """The settings that `compile_with` takes, where the target has any."""
    device: str
    submodel: Submodel
    fallbacks: tuple[str, ...] = ()
    """What of the graph runs elsewhere than on `device`, such as "3 of 120 nodes on the CPU: Loop, Where"; `--strict`
    refuses that.
    """
    packages: ClassVar[tuple[str, ...]]
    """Distributions whose versions decide what it compiles: a build records them, and compiles again where one changed.
    """
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What it can do in several ways that differ in speed by the processor, by name, and every value; see
    `runtime.placing.choices`.
    """
    decisions: Mapping[str, Decision] = MappingProxyType({})
    """What was decided of those choices that this submodel has, and why."""
    _slots: MutableMapping[Slot, Any]
    """What each slot holds, of an engine that keeps states."""
    reload_seconds: float = 0.0
    """Time spent on loading it again after it made room for others; see `runtime.placing.offload`."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """What was decided for this device, and why, for reading: "attention=float32: measured on this
        processor: ...".
        """
        return tuple(f"{name}={decision.value}: {decision.reason}" for name, decision in self.decisions.items())

    @property
    def computes(self) -> str:
        """What it computes in where nothing is quantized: what the bundle asks for where the target has kernels for
        that, else float32.
        """
        return self.submodel.precision.compute if self.submodel.precision.compute in self.precisions else "float32"

    @classmethod
    @abstractmethod
    def available(cls) -> Availability:
        """Probe this machine. Imports the vendor SDK lazily and never raises."""

    @classmethod
    def compile(cls, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        """`compile_with` the default options."""
        return cls.compile_with(CompileOptions(), submodel, graph, output)

    @classmethod
    @abstractmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        """Lower the canonical ONNX at `graph` for this target and write the result into the folder `output`.

        Raises InvalidInput for a setting that the target lacks, EngineError for a graph that it cannot compile.
        """

    @classmethod
    def check_settings(cls, settings: Mapping[str, str]) -> None:
        """Raise InvalidInput, naming the setting, for one that `compile_with` would refuse whatever it compiles."""
        if cls.compile_settings is not None:
            cls.compile_settings.parse(settings)
        for name in settings if cls.compile_settings is None else ():
            raise InvalidInput(name, f"is no setting of target {cls.target}, which has none")

    @classmethod
    @abstractmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        """Load a submodel of the bundle at `root`. Raises EngineError."""

    @classmethod
    def emulate(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        """An engine that computes on this machine what was compiled for another, to be compared with the canonical
        graph.

        Where the target runs here, that is `load`. Raises EngineUnavailable, saying what is missing, where neither can
        be done.
        """
        found = cls.available()
        if not found.usable:
            raise EngineUnavailable(f"what {cls.target} compiles cannot be computed here: {found.reason}")
        return cls.load(submodel, root, options)

    @classmethod
    def misfit(cls, artifact: Artifact) -> str:
        """Why `load` would refuse what was compiled, on this machine (another GPU, another version); empty where it
        fits.
        """
        return ""

    @classmethod
    def reads_graph(cls, artifact: Artifact) -> bool:
        """Whether `load` needs the canonical graph, or its weights, beside what was compiled. If not, a bundle may
        leave them out.
        """
        return True

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        """Run once. `inputs` match the signature; states, if any, live in `slot`. Outputs are copies the caller may
        keep.
        """

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        """A decoder's outputs of the last `count` new positions, in order: [batch, count, ...], where `run` gives those
        of the last one, [batch, 1, ...].

        Targets that compute them in one run override this; the default runs the last positions one by one. Raises
        EngineError when the call has fewer new positions.
        """
        signature, sequence = self.submodel.signature, self.require_positions(inputs, count)
        first = sequence - count + 1
        pieces = [(0, first), *((position, position + 1) for position in range(first, sequence))]
        return signature.joined([self.run(signature.cut(inputs, *piece), slot) for piece in pieces])

    def require_positions(self, inputs: Mapping[str, Array], count: int) -> int:
        """The number of new positions of a call. Raises EngineError when there are fewer than `count`."""
        signature = self.submodel.signature
        sequence = signature.lengths(inputs)[signature.decoder.sequence]
        if not 0 < count <= sequence:
            raise EngineError(
                f"outputs of {count} positions were requested of {self.submodel.name}, the call has {sequence}"
            )
        return sequence

    def run_many(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        """The outputs of several calls, in order: each equals what `run` gives of it alone, within rounding.

        Slots are distinct. Targets that compute several slots together override this. Where one call is refused, none
        has outputs (EngineError); those that were run have written their states.
        """
        return [self.run(inputs, slot) for inputs, slot in calls]

    def fork(self, slot: Slot, n: int) -> list[Slot]:
        """`n` new slots that continue from what `slot` holds. What is run on one changes no other."""
        forks = [Slot() for _ in range(n)]
        for fork in forks:
            self.copy(slot, fork)
        return forks

    def copy(self, slot: Slot, to: Slot) -> None:
        """Let the new slot `to` hold what `slot` holds. Engines with states override this."""
        raise NotImplementedError(f"{self.target} keeps no states")

    def trim(self, slot: Slot, length: int) -> None:
        """Forget what a slot's states hold beyond `length` positions.

        The mask of the next call says how many positions of a slot are valid, so only a slot that begins anew has to be
        dropped. Engines whose states are as long as what they hold override this.
        """
        if length == 0:
            self._slots.pop(slot, None)

    def close(self) -> None:
        """Free what the SDK holds. The engine cannot be used afterwards."""


class FakeEngine(Engine):
    """An engine made of a function, for tests: records its calls."""

    target = "fake"
    rank = 99
    device = "none"
    computes = "float32"

    def __init__(self, function: Callable[[Mapping[str, Array]], dict[str, Array]]) -> None:
        self.function = function
        self.calls: list[dict[str, Array]] = []

    @classmethod
    def available(cls) -> Availability:
        return Availability(True, ("none",))

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        raise NotImplementedError

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        raise NotImplementedError

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        self.calls.append(dict(inputs))
        return self.function(inputs)

    def copy(self, slot: Slot, to: Slot) -> None:
        pass

    def trim(self, slot: Slot, length: int) -> None:
        pass


def divided(outputs: Mapping[str, Array], rows: Sequence[int]) -> list[dict[str, Array]]:
    """Outputs of calls that were run together, as those of each: the calls have so many rows, one behind the other."""
    if len(rows) == 1:
        return [dict(outputs)]
    ends = np.cumsum(rows)
    return [
        {name: array[end - count : end].copy() for name, array in outputs.items()}
        for end, count in zip(ends, rows, strict=True)
    ]


def require_distinct(calls: Sequence[SlotCall]) -> None:
    """Raise EngineError where a slot occurs in more than one of the calls: they would continue one another."""
    slots = [slot for _, slot in calls if slot is not None]
    if len(set(slots)) < len(slots):
        raise EngineError("a slot occurs twice in one batch of calls, expected one call for each: run them in turn")


@cache
def targets() -> dict[str, type[Engine]]:
    """Every target by name, best first: the classes in `runtime/targets/<target>/engine.py`."""
    found: list[type[Engine]] = []
    for room in modules(runtime.targets):
        if importlib.util.find_spec(f"{room.__name__}.engine") is None:  # what several targets share
            continue
        loaded = importlib.import_module(f"{room.__name__}.engine")
        found += [
            c
            for c in vars(loaded).values()
            if isinstance(c, type) and issubclass(c, Engine) and c.__module__ == loaded.__name__
        ]
    return {engine.target: engine for engine in sorted(found, key=lambda engine: engine.rank)}


def check_precisions(names: Iterable[str], needed: Collection[str]) -> None:
    """Raise InvalidInput when one of these targets has no kernels for what a recipe makes of layers, naming those that
    have.
    """
    able = [engine.target for engine in targets().values() if engine.precisions.issuperset(needed)]
    for name in names:
        lacking = sorted(set(needed) - target(name).precisions)
        if lacking:
            raise InvalidInput(
                "target",
                f"{name} cannot compute in {' and '.join(lacking)}, only in "
                f"{', '.join(sorted(target(name).precisions))}: "
                f"choose another --quant, or of the targets {', '.join(able) or 'none that is known here'}",
            )


def target(name: str) -> type[Engine]:
    """The engine class of a target. Raises NotFound with the nearest name."""
    if name not in targets():
        raise NotFound(f"target '{name}' is not known: {did_you_mean(name, targets())}")
    return targets()[name]
