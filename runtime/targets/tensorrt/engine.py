"""TensorRT, and TensorRT for RTX, which compiles ahead of time on machines without a GPU: one implementation over their
common Python API.

Networks are strongly typed: every layer computes in the type that the graph says. Lengths between the minimum and the
maximum of the signature are one optimization profile; decoders have two, for one position and for many, and caches of
fixed length updated in place.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle.manifest import Artifact, Bundle, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Availability, Compiled, CompileOptions, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, MissingDependency
from runtime.files import written
from runtime.optional import require
from runtime.targets.lowering.static_cache import INDICES
from runtime.targets.nvidia import cuda
from runtime.targets.tensorrt.compile import Compiler
from runtime.targets.tensorrt.lower import OLDEST_FLOAT8, lower
from runtime.targets.tensorrt.run import Cache, LoadedEngine
from runtime.targets.tensorrt.sdk import SDK, dotted, driver
from runtime.targets.tensorrt.settings import TensorRTLoadSettings, TensorRTSettings

AMPERE: Final = 80
OF_THE_MACHINE: Final = ("compute_capability", "timing_cache", "plugins")
"""Settings that mean nothing, or something else, on another machine."""


class TensorRT(Engine):
    """A plan, the execution contexts that run it, and the buffers on the device that they read and write."""

    target = "tensorrt"
    packages = ("tensorrt", "onnx-ir")
    rank = 10
    precisions = frozenset({"float32", "float16", "bfloat16", "int8", "int4", "fp8"})
    compile_settings = TensorRTSettings
    sdk: ClassVar[SDK] = SDK("tensorrt", "TensorRT", "tensorrt", ahead=False)

    @classmethod
    def available(cls) -> Availability:
        try:
            trt = require(cls.sdk.module, cls.sdk.extra)
        except MissingDependency as error:
            other = (
                ""
                if cls.sdk.ahead
                else ". Or --target tensorrt-rtx, which compiles without a GPU: pip install 'enginecast[tensorrt-rtx]'"
            )
            return Availability(False, reason=f"{error}{other}")
        found, reason = cuda.devices(cls.sdk.extra)
        names = tuple(f"cuda:{device.index} ({device.name}, {dotted(device.capability)})" for device in found)
        return Availability(bool(names), names, reason, trt.__version__, compiles=bool(names) or cls.sdk.ahead)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        settings = TensorRTSettings.parse(options.settings)
        for name in ("hardware", "timing_cache"):
            if cls.sdk.ahead and getattr(settings, name):
                raise InvalidInput(
                    name,
                    f"is of no use to {cls.sdk.name}: it measures no kernels, and compute_capability names its GPUs",
                )
        found = cls.available()
        if not (found.usable or found.compiles):
            raise EngineUnavailable(f"cannot compile for {cls.target}: {found.reason}")
        require("onnx_ir", cls.sdk.extra)
        lowered = lower(submodel, graph, settings)
        capabilities = cls._capabilities(settings, lowered.oldest)
        output.mkdir(parents=True, exist_ok=True)
        files = [f"{submodel.name}.engine"]
        with Compiler(cls.sdk, submodel, settings, options.progress) as compiler:
            compiler.parse(lowered, graph)
            compiler.configure(capabilities)
            compiler.build(output / files[0])
        if settings.weights == "stripped":
            files.append(f"{submodel.name}.onnx")
            with written(output / files[1]) as file:
                file.write(lowered.content)
        return Artifact(
            target=cls.target,
            submodel=submodel.name,
            files=tuple(files),
            key={
                "sdk": found.version,
                "compute_capability": ",".join(map(dotted, capabilities)),
                **cls._system(),
                **settings.key(),
            },
            settings={name: value for name, value in options.settings.items() if name not in OF_THE_MACHINE},
            seconds=time.perf_counter() - start,
        )

    @classmethod
    def _system(cls) -> dict[str, str]:
        """The system and driver that engines of TensorRT are bound to (its support matrix). Engines of TensorRT for RTX
        are not.
        """
        return {} if cls.sdk.ahead else {"os": platform.system().lower(), "driver": str(driver(cls.sdk))}

    @classmethod
    def _capabilities(cls, settings: TensorRTSettings, oldest: int) -> tuple[int, ...]:
        """The compute capabilities to compile for. `oldest` is the first that has the types of the graph.

        Raises InvalidInput for a GPU that the SDK does not know, that lacks a type, or, for TensorRT, that is not in
        this machine.
        """
        here = sorted({device.capability for device in cuda.devices(cls.sdk.extra)[0]})
        if not cls.sdk.ahead:
            if settings.compute_capability and set(settings.compute_capability) - set(here[:1]):
                raise InvalidInput(
                    "compute_capability",
                    f"{cls.sdk.name} compiles for the GPU of this machine alone ({dotted(here[0])}): use --target "
                    "tensorrt-rtx for others",
                )
            return tuple(here[:1])
        members = require(cls.sdk.module, cls.sdk.extra).ComputeCapability.__members__
        known = sorted(int(name[2:]) for name in members if name.startswith("SM"))
        for capability in settings.compute_capability:
            if capability not in known:
                raise InvalidInput(
                    "compute_capability",
                    f"{dotted(capability)} is none that {cls.sdk.name} knows: {', '.join(map(dotted, known))}",
                )
        if oldest == OLDEST_FLOAT8 and any(capability < oldest for capability in settings.compute_capability):
            raise InvalidInput(
                "compute_capability", f"fp8 needs {dotted(oldest)} or later: choose another --quant for older GPUs"
            )
        return (
            settings.compute_capability
            or tuple(capability for capability in here if capability in known)
            or tuple(capability for capability in known if capability >= oldest)
        )

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        settings = TensorRTLoadSettings.parse(options.settings)
        device = cls._device(options.device)
        compiled = options.compiled or cls._held(Bundle(root), submodel.name)
        reason = cls._misfit(compiled.artifact, device)
        if reason:
            raise EngineError(
                f"the engine of {submodel.name} {reason}: build the bundle again, or add one for this machine with "
                "`enginecast add-target`"
            )
        return cls(submodel, LoadedEngine(cls.sdk, submodel, settings, device, compiled, root / submodel.graph))

    @classmethod
    def _held(cls, bundle: Bundle, submodel: str) -> Compiled:
        """The artifact in the bundle for this machine, else any. Raises EngineError when there is none."""
        artifacts = [artifact for artifact in bundle.artifacts(cls.target, submodel) if artifact.files]
        if not artifacts:
            raise EngineError(
                f"bundle {bundle.name} holds no {cls.target} engine of {submodel}: build it with --target {cls.target}"
            )
        fitting = (artifact for artifact in artifacts if not cls.misfit(artifact))
        return Compiled.of(bundle.root, next(fitting, artifacts[0]))

    @classmethod
    def misfit(cls, artifact: Artifact) -> str:
        found = cls.available()
        return cls._misfit(artifact, cls._device("")) if found.usable else f"cannot run here: {found.reason}"

    @classmethod
    def _misfit(cls, artifact: Artifact, device: cuda.Device) -> str:
        """The differences between this machine and the one that an engine was compiled on or for."""
        key, version, system = (
            artifact.key,
            require(cls.sdk.module, cls.sdk.extra).__version__,
            platform.system().lower(),
        )
        capabilities = key.get("compute_capability", "").split(",")
        here = dotted(device.capability)
        if not artifact.files:
            return "has no file"
        same = key.get("sdk") == version or key.get("compatible") == "version"
        fits = here in capabilities or (key.get("hardware") == "ampere+" and device.capability >= AMPERE)
        differences = []
        if not (same and fits):
            differences.append(
                f"by {cls.sdk.name} {key.get('sdk')} for compute capability {key.get('compute_capability')}, and here "
                f"are {cls.sdk.name} "
                f"{version} and {device.name} of {here}"
            )
        if key.get("os", system) != system:
            differences.append(f"on {key['os']}, and here is {system}")
        if "driver" in key and not (key["driver"].isdecimal() and int(key["driver"]) <= driver(cls.sdk)):
            differences.append(f"with a driver of CUDA {key['driver']}, and here is one of CUDA {driver(cls.sdk)}")
        return f"was compiled {'; '.join(differences)}" if differences else ""

    @classmethod
    def reads_graph(cls, artifact: Artifact) -> bool:
        return artifact.key.get("weights") == "stripped"

    @classmethod
    def _device(cls, wanted: str) -> cuda.Device:
        """The device of that name, "cuda:0" or "cuda", or the first. Raises EngineUnavailable."""
        found = cls.available()
        if not found.usable:
            raise EngineUnavailable(f"{cls.target} cannot run here: {found.reason}")
        devices, _ = cuda.devices(cls.sdk.extra)
        for device in devices:
            if wanted in ("", "cuda", f"cuda:{device.index}"):
                return device
        raise EngineUnavailable(f"{cls.sdk.name} has no device '{wanted}' here: it found {', '.join(found.devices)}")

    def __init__(self, submodel: Submodel, loaded: LoadedEngine) -> None:
        self.submodel = submodel
        self.device = f"{self.target}:cuda:{loaded.device.index} ({loaded.device.name})"
        self._loaded = loaded
        self._slots: WeakKeyDictionary[Slot, Cache] = WeakKeyDictionary()

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        try:
            self.submodel.signature.bind(inputs)
            if not self.submodel.signature.states:
                return self._loaded.run(0, inputs, {})
            return self._run_slot(inputs, slot or Slot())
        except (EngineError, InvalidInput, RuntimeError) as error:  # the SDK's own are RuntimeErrors
            raise EngineError(f"{self.sdk.name} could not run {self.submodel.name}: {error}") from None

    def _run_slot(self, inputs: Mapping[str, Array], slot: Slot) -> dict[str, Array]:
        """Run on a slot's caches: new keys and values are written behind those that the mask says are there."""
        port, capacity = self.submodel.signature.decoder, self._loaded.capacity
        (batch, sequence), total = inputs[port.positions].shape, inputs[port.mask].shape[1]
        if total > capacity:
            raise EngineError(
                f"{total} positions do not fit its cache of {capacity}: build it with a larger context, or say less"
            )
        if slot not in self._slots:
            self._slots[slot] = Cache(batch, self._loaded)
        cache = self._slots[slot]
        if cache.batch != batch:
            raise EngineError(f"the slot holds {cache.batch} rows, this call has {batch}")
        mask = np.zeros((batch, capacity), np.int64)
        mask[:, :total] = inputs[port.mask]
        fixed = dict(inputs) | {port.mask: mask, INDICES: np.full(batch, total - sequence, np.int64)}
        return self._loaded.run(0 if sequence == 1 else 1, fixed, cache.buffers)

    def copy(self, slot: Slot, to: Slot) -> None:
        held = self._slots.get(slot)
        if held is not None:
            self._slots[to] = held.copied()

    def close(self) -> None:
        self._slots.clear()
        self._loaded.close()


class TensorRTForRTX(TensorRT):
    """TensorRT for GeForce RTX and RTX PRO GPUs: kernels are compiled on the device, when the engine is loaded."""

    target = "tensorrt-rtx"
    packages = ("tensorrt-rtx", "onnx-ir")
    rank = 11
    sdk = SDK("tensorrt_rtx", "TensorRT for RTX", "tensorrt-rtx", ahead=True)
