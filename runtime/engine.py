"""The interface of engines: named arrays in, named arrays out. Each target has a room `runtime/targets/<target>/`,
found by listing the folder.
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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

import runtime.targets
from runtime.bundle.manifest import Artifact, Submodel
from runtime.bundle.signature import Array
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, NotFound, did_you_mean
from runtime.listing import modules
from runtime.placing.choices import Decision
from runtime.settings import Texts

if TYPE_CHECKING:
    from runtime.stacking import Timed


class Slot:
    """The identity of one sequence's states (its KV cache). The engine allocates on first use and frees when the slot
    is gone.
    """


class SlotCall(NamedTuple):
    """The inputs of one call, and the slot whose states it continues. A decoder gives outputs of the `last` of its new
    positions (`Engine.run_last`).
    """

    inputs: Mapping[str, Array]
    slot: Slot | None = None
    last: int = 1


@dataclass(frozen=True)
class Availability:
    """Whether a target can run on this machine. `reason` says why not, `devices` lists the devices it can use, best
    first.

    `compiles` is True where the target cannot run here but compiles ahead of time for devices of other machines.
    """

    usable: bool
    devices: tuple[str, ...] = ()
    reason: str = ""
    version: str = ""
    compiles: bool = False


@dataclass(frozen=True)
class Compiled:
    """The artifact that a target compiled of a submodel, and the folder that holds its files: the bundle's, or one in
    the user's cache.
    """

    artifact: Artifact
    folder: Path

    @classmethod
    def of(cls, root: Path, artifact: Artifact) -> Compiled:
        """An artifact of the bundle at `root`."""
        return cls(artifact, root / "engines" / artifact.target / artifact.folder)


@dataclass(frozen=True)
class Options:
    """How to load an engine. `threads` 0 means all cores.

    `compiled` is the artifact to load, as `runtime.placing.portable.fitting` found it; by default the one in the
    bundle. `verify` is called before files are read again after loading; it raises BundleError where they have changed
    since they were verified.
    """

    device: str = ""
    threads: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    compiled: Compiled | None = None
    verify: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class CompileOptions:
    """How to compile. `settings` are the target's own, by name; `progress` is called with the share done, from 0 to 1,
    and the name of the phase.

    An exception that `progress` raises stops the compilation and is raised again.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[float, str], None] = lambda share, phase: None


class Engine(ABC):
    """One submodel, loaded on one device by one target."""

    target: ClassVar[str]
    rank: ClassVar[int]
    """Order of preference among usable targets: lower is tried first."""
    precisions: ClassVar[frozenset[str]] = frozenset({"float32", "int8", "int4"})
    """The precisions it has kernels for: also "float16", "bfloat16", "fp8". Those it would only emulate are left out,
    since that is slower than float32.
    """
    compile_settings: ClassVar[type[Texts] | None] = None
    """The settings that `compile_with` takes, where the target has any."""
    device: str
    submodel: Submodel
    fallbacks: tuple[str, ...] = ()
    """The parts of the graph that run on another device than `device`, such as "3 of 120 nodes on the CPU: Loop,
    Where"; `--strict` refuses them.
    """
    packages: ClassVar[tuple[str, ...]]
    """Distributions whose versions affect what is compiled: a build records them, and compiles again where one has
    changed.
    """
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Choices whose best value depends on the processor, by name, with every value; see `runtime.placing.choices`."""
    decisions: Mapping[str, Decision] = MappingProxyType({})
    """The decisions on the choices that this submodel has, with reasons."""
    timed: tuple[Timed, ...] = ()
    """Calls that were measured here before with more and fewer rows, from which a server knows how many to make as one.
    """
    _slots: MutableMapping[Slot, Any]
    """What each slot holds, of an engine that keeps states."""
    reload_seconds: float = 0.0
    """Seconds spent on loading the engine again after it made room for others; see `runtime.placing.offload`."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The decisions for this device with their reasons, for display: "attention=float32: measured on this
        processor: ...".
        """
        return tuple(f"{name}={decision.value}: {decision.reason}" for name, decision in self.decisions.items())

    @property
    def computes(self) -> str:
        """The type it computes in where nothing is quantized: the bundle's `compute` where the target has kernels for
        it, else float32.
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
    def decide(cls, submodel: Submodel, root: Path, options: Options) -> None:
        """Decide those of the submodel's `choices` that are still open, by timing them: `load` finds them decided then.
        By default `load` does it. Raises the errors of `load`.
        """
        return

    @classmethod
    def emulate(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        """An engine that computes on this machine what was compiled for another, for comparison with the canonical
        graph.

        Where the target runs here, this is `load`. Raises EngineUnavailable, naming what is missing, where neither is
        possible.
        """
        found = cls.available()
        if not found.usable:
            raise EngineUnavailable(f"what {cls.target} compiles cannot be computed here: {found.reason}")
        return cls.load(submodel, root, options)

    @classmethod
    def misfit(cls, artifact: Artifact) -> str:
        """Why `load` would refuse the artifact on this machine (another GPU, another version); empty where it fits."""
        return ""

    @classmethod
    def reads_graph(cls, artifact: Artifact) -> bool:
        """Whether `load` needs the canonical graph or its weights beside the artifact. If not, a bundle may leave them
        out.
        """
        return True

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        """Run once. `inputs` match the signature; states, if any, live in `slot`. The outputs are copies that the
        caller may keep.
        """

    def joins(self, inputs: Mapping[str, Array]) -> bool:
        """Whether a call like this one may have more rows without being compiled for them first."""
        return True

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
        """The outputs of several calls, in order: each equals those of `run_alone`, within rounding.

        Slots are distinct. Targets that compute several slots together override this. Where one call is refused, none
        returns outputs (EngineError), but those that ran have written their states.
        """
        return [run_alone(self, call) for call in calls]

    def fork(self, slot: Slot, n: int) -> list[Slot]:
        """`n` new slots that continue from the states of `slot`. A run on one changes no other."""
        forks = [Slot() for _ in range(n)]
        for fork in forks:
            self.copy(slot, fork)
        return forks

    def copy(self, slot: Slot, to: Slot) -> None:
        """Copy the states of `slot` to the new slot `to`. Engines with states override this."""
        raise NotImplementedError(f"{self.target} keeps no states")

    def trim(self, slot: Slot, length: int) -> None:
        """Forget what a slot's states hold beyond `length` positions.

        The mask of the next call says how many positions of a slot are valid, so only a slot that begins anew has to be
        dropped. Engines whose states are as long as what they hold override this.
        """
        if length == 0:
            self._slots.pop(slot, None)

    def close(self) -> None:
        """Free the SDK's resources. The engine cannot be used afterwards."""


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
    """Split the outputs of calls that were run together. `rows` is the number of rows of each call, in order."""
    if len(rows) == 1:
        return [dict(outputs)]
    ends = np.cumsum(rows)
    return [
        {name: array[end - count : end].copy() for name, array in outputs.items()}
        for end, count in zip(ends, rows, strict=True)
    ]


def run_alone(engine: Engine, call: SlotCall) -> dict[str, Array]:
    """The outputs of one call: `run`, or `run_last` where it asks for several positions."""
    if call.last == 1:
        return engine.run(call.inputs, call.slot)
    return engine.run_last(call.inputs, call.slot or Slot(), call.last)


def require_distinct(calls: Sequence[SlotCall]) -> None:
    """Raise EngineError where a slot occurs in more than one of the calls, which would then depend on one another."""
    slots = [call.slot for call in calls if call.slot is not None]
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
    """Raise InvalidInput when one of these targets has no kernels for a precision of a recipe, naming targets that
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
