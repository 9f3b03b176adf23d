"""Core ML: an ML program for each submodel (.mlpackage, macOS 15 and iOS 18). It is compiled on any machine and runs on
Apple's.

Where there is no Core ML, `emulate` interprets the package with numpy. Decoders keep their caches as states of a fixed
length, in float16, and compute rows one by one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle.manifest import Artifact, Bundle, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Availability, Compiled, CompileOptions, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, MissingDependency, ResourceExhausted
from runtime.files import FULL
from runtime.optional import require
from runtime.settings import Texts
from runtime.targets.coreml.interpret import Interpreter
from runtime.targets.coreml.package import Package, save
from runtime.targets.coreml.sdk import coremltools
from runtime.targets.coreml.shapes import CoreMLSettings, Taken, input_types, lengths_of, symbols
from runtime.targets.coreml.translate import identifier, translate
from runtime.targets.lowering.half import to_half
from runtime.targets.lowering.nested import widen
from runtime.targets.lowering.static_cache import INDICES, capacity, with_static_cache
from runtime.targets.lowering.values import dtype_of, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

UNITS: Final = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
"""The devices: names of coremltools' ComputeUnit."""
OLDEST: Final = 15
"""The first macOS that has states and int4 weights by blocks."""
TRANSLATED: Final = 0.1
"""Share of the work that is done once the program is translated; the rest is writing weights."""


class CoreMLLoadSettings(Texts):
    """Settings of `Options.settings` when loading: Core ML's optimization hints (coremltools' `optimization_hints`).

    `reshapes`: "infrequent" optimizes for a new shape for a long time when it first occurs, "frequent" starts sooner
    with each new one. `specialization`: "fast" prefers fast predictions to fast loading.
    """

    reshapes: Literal["", "frequent", "infrequent"] = ""
    specialization: Literal["", "fast"] = ""

    def hints(self, ct: Any) -> dict[str, Any]:
        """The hints in the form that MLModel expects."""
        found = {}
        if self.reshapes:
            found["reshapeFrequency"] = getattr(ct.ReshapeFrequency, self.reshapes.capitalize())
        if self.specialization:
            found["specializationStrategy"] = ct.SpecializationStrategy.FastPrediction
        return found


class CoreML(Engine):
    """A package, a model that predicts with it (coremltools' MLModel, or the interpreter), and the states of each
    slot.
    """

    target = "coreml"
    packages = ("coremltools", "onnx-ir")
    rank = 15
    precisions = frozenset({"float32", "float16", "int8", "int4"})
    compile_settings = CoreMLSettings

    @classmethod
    def available(cls) -> Availability:
        if importlib.util.find_spec("coremltools") is None:
            return Availability(False, reason=str(MissingDependency("coremltools", "coreml")))
        version = importlib.metadata.version("coremltools")
        reason = _reason()
        return Availability(not reason, () if reason else UNITS, reason, version, compiles=True)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        settings = CoreMLSettings.parse(options.settings)
        found = cls.available()
        if not found.compiles:
            raise EngineUnavailable(f"cannot compile for {cls.target}: {found.reason}")
        package = output / f"{submodel.name}.mlpackage"
        lengths = lengths_of(submodel.signature, settings)
        model = _lowered(submodel, graph, settings)
        dims = symbols(lengths)
        progress = _Progress(options, submodel)
        states = [state.past.name for state in submodel.signature.states]
        try:
            program = translate(model, dims, states, progress.read)
            progress.begin(program)
            inputs = {identifier(value.name): _shape(value) for value in model.graph.inputs if value.name not in states}
            output.mkdir(parents=True, exist_ok=True)
            save(program, input_types(inputs, lengths, dims, settings.shapes == "enumerated"), package)
        except EngineError as error:
            raise EngineError(f"could not compile {submodel.name} for Core ML: {error}") from error
        except OSError as error:
            if error.errno in FULL:
                raise ResourceExhausted(
                    f"the disk filled up while writing {package}: free some space or choose another folder"
                ) from None
            raise EngineError(f"could not compile {graph}: {error}. Build the bundle again") from None
        options.progress(1.0, "Package written")
        return Artifact(
            target=cls.target,
            submodel=submodel.name,
            files=tuple(sorted(path.relative_to(output).as_posix() for path in package.rglob("*") if path.is_file())),
            key={"minimum_deployment_target": f"macOS{OLDEST}", "coremltools": found.version},
            settings=dict(options.settings),
            seconds=time.perf_counter() - start,
        )

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        settings = CoreMLLoadSettings.parse(options.settings)
        found = cls.available()
        if not found.usable:
            raise EngineUnavailable(f"{cls.target} cannot run here: {found.reason}")
        unit = options.device or UNITS[0]
        if unit not in UNITS:
            raise EngineUnavailable(f"Core ML has no device '{unit}' here: expected {', '.join(UNITS)}")
        ct = coremltools()
        compiled = options.compiled or cls._held(Bundle(root), submodel.name)
        package = Package(_package(compiled, submodel.name))
        try:
            model = ct.models.MLModel(
                str(package.path), compute_units=ct.ComputeUnit[unit], optimization_hints=settings.hints(ct) or None
            )
        except Exception as error:  # what Core ML says comes as a RuntimeError, what coremltools says as various
            raise EngineError(f"Core ML could not load {package.path}: {error}") from None
        return cls(submodel, package, model, f"coreml:{unit}", compiled.artifact)

    @classmethod
    def emulate(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        if cls.available().usable:
            return cls.load(submodel, root, options)
        if options.device:
            raise EngineUnavailable(f"what is emulated has no device '{options.device}': name none")
        if importlib.util.find_spec("coremltools") is None:
            raise EngineUnavailable(
                f"what {cls.target} compiles cannot be computed here: {MissingDependency('coremltools', 'coreml')}"
            )
        compiled = options.compiled or cls._held(Bundle(root), submodel.name)
        package = Package(_package(compiled, submodel.name))
        return cls(submodel, package, Interpreter(package), "coreml:interpreted", compiled.artifact)

    @classmethod
    def _held(cls, bundle: Bundle, submodel: str) -> Compiled:
        """The artifact in the bundle. Raises EngineError when there is none."""
        artifacts = [artifact for artifact in bundle.artifacts(cls.target, submodel) if artifact.files]
        if not artifacts:
            raise EngineError(
                f"bundle {bundle.name} holds no {cls.target} package of {submodel}: build it with --target {cls.target}"
            )
        return Compiled.of(bundle.root, artifacts[-1])

    @classmethod
    def misfit(cls, artifact: Artifact) -> str:
        """A package runs on every machine that its deployment target covers, so `available` decides."""
        found = cls.available()
        return "" if found.usable else f"cannot run here: {found.reason}"

    @classmethod
    def reads_graph(cls, artifact: Artifact) -> bool:
        return False

    def __init__(self, submodel: Submodel, package: Package, model: Any, device: str, artifact: Artifact) -> None:
        """`model` has MLModel's `predict` and `make_state`, which gives MLState's `read_state` and `write_state`."""
        self.submodel, self.device = submodel, device
        self._model = model
        self._precision = artifact.settings.get("precision", "")
        self._taken = {feature.name: Taken(feature) for feature in package.spec.description.input}
        self._states = tuple(feature.name for feature in package.spec.description.state)
        self._slots: WeakKeyDictionary[Slot, list[Any]] = WeakKeyDictionary()

    @property
    def computes(self) -> str:
        return self._precision or super().computes

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        try:
            self.submodel.signature.bind(inputs)
            if not self.submodel.signature.states:
                return self._predict(inputs)
            return self._run_slot(inputs, slot or Slot())
        except (EngineError, InvalidInput, RuntimeError, ValueError) as error:  # Core ML's own are RuntimeErrors
            raise EngineError(f"Core ML could not run {self.submodel.name}: {error}") from None

    def _run_slot(self, inputs: Mapping[str, Array], slot: Slot) -> dict[str, Array]:
        """Run each row on its own states. New positions are split into as many calls as the package's lengths
        require.
        """
        port = self.submodel.signature.decoder
        (batch, sequence), total = inputs[port.positions].shape, inputs[port.mask].shape[1]
        longest = self._taken[identifier(port.mask)].longest(1, 1 << 31)
        if total > longest:
            raise EngineError(
                f"{total} positions do not fit its cache of {longest}: build it with a larger context, or say less"
            )
        if slot not in self._slots:
            self._slots[slot] = [self._model.make_state() for _ in range(batch)]
        states = self._slots[slot]
        if len(states) != batch:
            raise EngineError(f"the slot holds {len(states)} rows, this call has {batch}")
        rows = [self._run_row(inputs, row, total - sequence, longest, state) for row, state in enumerate(states)]
        return {name: np.concatenate([found[name] for found in rows]) for name in rows[0]}

    def _run_row(self, inputs: Mapping[str, Array], row: int, past: int, longest: int, state: Any) -> dict[str, Array]:
        signature, outputs = self.submodel.signature, dict[str, Array]()
        own = {name: array[row : row + 1] for name, array in inputs.items()}
        for start, end in self._parts(own[signature.decoder.positions].shape[1]):
            now = signature.cut(own, start, end) | {INDICES: np.array([past + start])}
            mask = np.zeros((1, longest), np.int64)
            mask[:, : past + end] = now[signature.decoder.mask]
            outputs = self._predict(now | {signature.decoder.mask: mask}, state)
        return outputs

    def _parts(self, sequence: int) -> Iterator[tuple[int, int]]:
        """The new positions split into lengths that the package accepts, the longest first."""
        start, taken = 0, self._taken[identifier(self.submodel.signature.decoder.positions)]
        while start < sequence:
            count = taken.longest(1, sequence - start)
            if not count:
                raise EngineError(f"{sequence - start} positions are fewer than it takes: {taken}")
            yield start, start + count
            start += count

    def _predict(self, inputs: Mapping[str, Array], state: Any = None) -> dict[str, Array]:
        data = {}
        for name, array in inputs.items():
            taken = self._taken[identifier(name)]
            if array.shape not in taken:
                raise EngineError(
                    f"{name} is {array.shape}, and it was compiled for {taken}: see the settings shapes and lengths"
                )
            data[identifier(name)] = np.ascontiguousarray(array.astype(np.int32) if array.dtype == np.int64 else array)
        results = self._model.predict(data) if state is None else self._model.predict(data, state)
        return {
            tensor.name: np.array(results[identifier(tensor.name)], tensor.dtype)
            for tensor in self.submodel.signature.outputs
        }

    def copy(self, slot: Slot, to: Slot) -> None:
        if slot in self._slots:
            self._slots[to] = [self._copied(state) for state in self._slots[slot]]

    def _copied(self, state: Any) -> Any:
        """A copy of a state (MLState)."""
        copy = self._model.make_state()
        for name in self._states:
            copy.write_state(name, state.read_state(name))
        return copy

    def close(self) -> None:
        self._slots.clear()
        self._model = None


class _Progress:
    """Reports the share of the weights that were read, which takes most of the time."""

    def __init__(self, options: CompileOptions, submodel: Submodel) -> None:
        self.options, self.whole, self.done = options, max(submodel.nbytes, 1), 0

    def begin(self, program: Any) -> None:
        self.options.progress(TRANSLATED, "Program translated")

    def read(self, nbytes: int) -> None:
        """Count bytes of weights that were read."""
        self.done += nbytes
        self.options.progress(TRANSLATED + (0.99 - TRANSLATED) * min(1.0, self.done / self.whole), "Weights written")


def _reason() -> str:
    """Why Core ML cannot run here."""
    if sys.platform != "darwin":
        return "Core ML runs on macOS alone; what was compiled here runs there, and is interpreted here to be compared"
    version = platform.mac_ver()[0]
    if int(version.split(".")[0] or 0) < OLDEST:
        return f"macOS {version} is too old for what is compiled, which needs {OLDEST} or later"
    return ""


def _package(compiled: Compiled, submodel: str) -> Path:
    """The package's folder, found through the files that the artifact lists."""
    part = next((Path(name) for name in compiled.artifact.files if Path(name).name == "Manifest.json"), None)
    if part is None:
        raise EngineError(
            f"the {compiled.artifact.target} artifact of {submodel} lists no package: build the bundle again"
        )
    return compiled.folder / part.parent


def _lowered(submodel: Submodel, graph: Path, settings: CoreMLSettings) -> Any:
    """The canonical graph in the precision to compute in; a decoder with caches of fixed length."""
    ir = require("onnx_ir", "coreml")
    try:
        model = ir.load(graph)
    except Exception as error:  # protobuf's and onnx_ir's own
        raise EngineError(f"could not compile {graph}: it cannot be read ({error}). Build the bundle again") from None
    widen(model)
    usual = submodel.precision.compute if submodel.precision.compute in CoreML.precisions else "float32"
    if (settings.precision or usual) == "float16":
        model = to_half(model, "float16", submodel.keep)
    if submodel.signature.states:
        model = with_static_cache(model, submodel.signature, capacity(submodel.signature, settings.context))
    return model


def _shape(value: ir.Value) -> tuple[tuple[int | str, ...], str]:
    """The dims of a graph's input, each a number or a name, and its dtype."""
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in shape_of(value))
    return dims, "float32" if dtype_of(value).name == "FLOAT" else "int32"
