"""TensorRT, and TensorRT for RTX, which compiles ahead of time on machines without a GPU: one implementation over their common Python API.

Networks are strongly typed: every layer computes in the type that the graph says. Lengths between the minimum and the maximum of the
signature are one optimization profile; decoders have two, for one position and for many, and caches of fixed length updated in place.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Final, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from runtime import cuda
from runtime.bundle import Artifact, Bundle, Submodel
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, MissingDependency, ResourceExhausted, did_you_mean
from runtime.lowering import to_half
from runtime.optional import require
from runtime.signature import Array, Dim, Signature, Tensor
from runtime.static_cache import INDICES, MASK, with_static_cache

STANDARD_DOMAINS: Final = ("", "ai.onnx")
AMPERE: Final = 80
OLDEST_FLOAT32: Final = 80
"""TensorRT for RTX multiplies float32 matrices from compute capability 8.0 on; it refuses them for 7.5."""
OLDEST_FLOAT8: Final = 89
INLINE_BYTES: Final = 1024
"""Converted weights from this size on are handed over by address: a serialized graph holds 2 GB at most."""
PREFILL: Final = 256
"""Usual number of new positions in the profile for many: about one picture and a question."""
UNITS: Final[Mapping[str, int]] = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _bytes(text: str) -> int:
    """Bytes of a size such as 512MiB."""
    number = text.rstrip("KMGiB")
    if not number.isdecimal() or text[len(number) :] not in UNITS:
        raise ValueError(f"is '{text}', expected a size such as 512MiB or 4GiB")
    return int(number) * UNITS[text[len(number) :]]


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(",") if part)


Bytes = Annotated[int, BeforeValidator(_bytes)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_paths)]
T = TypeVar("T", bound="Texts")


class Texts(BaseModel):
    """Settings given as texts, as a command line has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls: type[T], settings: Mapping[str, str]) -> T:
        """Settings from texts. Raises InvalidInput naming the one that is wrong."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            known = f" (known: {', '.join(sorted(cls.model_fields))})" if found["type"] == "extra_forbidden" else ""
            raise InvalidInput(name, f"{found['msg'].removeprefix('Value error, ')}{known}") from None


class Settings(Texts):
    """What `compile_with` takes. Texts, as a command line gives them.

    `compute_capability`: the GPUs to compile for, "8.9,12.0"; by default this machine's, or all that the SDK knows where it has none.
    `shapes`: narrower lengths than the signature's, "batch=1:2:8,height=64:64:128" (min:opt:max): less memory, faster kernels.
    `context`: positions that a decoder's cache holds; by default all that the model has.
    `workspace`: memory that a layer may use while it runs, "4GiB"; by default all.
    `weights`: "engine" stores them in the engine; "refit" lets them be exchanged later; "stripped" leaves them in the bundle's own files,
    from where they are read when the engine is loaded; "streamed" lets loading keep a part of them in the memory of the host.
    `compatible`: "version" makes an engine that later versions of the SDK load.
    `hardware` (TensorRT): "ampere+" makes one for all GPUs from Ampere on, "same" for those of the same compute capability.
    `timing_cache` (TensorRT): a file in which the times of kernels are kept between compilations.
    `optimization_level`: 0 (quick to compile) to 5 (quick to run).
    `plugins`: libraries that operators outside of the standard may be taken from. They run as native code: name only those you trust.
    `tf32`: lets float32 products be computed in TensorFloat-32, of 10 bits of mantissa.
    """

    compute_capability: tuple[int, ...] = ()
    shapes: Mapping[str, tuple[int, int, int]] = Field(default_factory=dict)
    context: int = Field(default=0, ge=0)
    workspace: Bytes = 0
    weights: Literal["engine", "refit", "stripped", "streamed"] = "engine"
    compatible: Literal["", "version"] = ""
    hardware: Literal["", "ampere+", "same"] = ""
    timing_cache: str = ""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    plugins: Paths = ()
    tf32: bool = False

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _capabilities(cls, text: str) -> tuple[int, ...]:
        parts = [part.strip().split(".") for part in text.split(",")]
        if not all(len(part) == 2 and part[0].isdecimal() and part[1].isdecimal() and len(part[1]) == 1 for part in parts):
            raise ValueError(f"is '{text}', expected versions such as 8.9 or 8.9,12.0")
        return tuple(dict.fromkeys(int("".join(part)) for part in parts))

    @field_validator("shapes", mode="before")
    @classmethod
    def _shapes(cls, text: str) -> dict[str, tuple[int, int, int]]:
        found = {}
        for part in text.split(","):
            name, _, numbers = part.strip().partition("=")
            lengths = numbers.split(":")
            if not name or len(lengths) != 3 or not all(map(str.isdecimal, lengths)):
                raise ValueError(f"has '{part}', expected NAME=MIN:OPT:MAX, such as batch=1:2:8")
            low, usual, high = map(int, lengths)
            if not low <= usual <= high:
                raise ValueError(f"has '{part}', expected MIN <= OPT <= MAX")
            found[name] = low, usual, high
        return found

    def key(self) -> dict[str, str]:
        """What of the settings decides where an engine can be loaded, and how."""
        return {"weights": self.weights} | {
            name: value for name, value in (("compatible", self.compatible), ("hardware", self.hardware)) if value
        }


class LoadSettings(Texts):
    """What `Options.settings` of `load` may hold.

    `weight_budget`: bytes of streamed weights that stay on the device, "2GiB"; by default what the SDK finds right for the memory there is.
    `plugins`: libraries that the engine's plugins are in. They run as native code: name only those you trust.
    `lean_runtime`: the library of the version that compiled the engine, for one made with compatible=version.
    `runtime_cache`: a file that kernels made on this device are kept in for the next start (TensorRT for RTX).
    `graphs`: whether repeated work is recorded and replayed (CUDA Graphs).
    """

    weight_budget: Bytes = 0
    plugins: Paths = ()
    lean_runtime: Path | None = None
    runtime_cache: Path | None = None
    graphs: bool = True


class SDK(NamedTuple):
    """One of the two packages. `ahead`: it compiles on machines without a GPU, for the compute capabilities that it is told."""

    module: str
    name: str
    extra: str
    ahead: bool


class TensorRT(Engine):
    """A plan, the execution contexts that run it, and the buffers on the device that they read and write."""

    target = "tensorrt"
    rank = 10
    precisions = frozenset({"float32", "float16", "bfloat16", "int8", "int4", "fp8"})
    sdk: ClassVar[SDK] = SDK("tensorrt", "TensorRT", "tensorrt", ahead=False)

    @classmethod
    def available(cls) -> Availability:
        try:
            trt = require(cls.sdk.module, cls.sdk.extra)
        except MissingDependency as error:
            other = (
                "" if cls.sdk.ahead else ". Or --target tensorrt-rtx, which compiles without a GPU: pip install 'enginecast[tensorrt-rtx]'"
            )
            return Availability(False, reason=f"{error}{other}")
        found, reason = cuda.devices(cls.sdk.extra)
        names = tuple(f"cuda:{device.index} ({device.name}, {_dotted(device.capability)})" for device in found)
        return Availability(bool(names), names, reason, trt.__version__, compiles=bool(names) or cls.sdk.ahead)

    @classmethod
    def compile(cls, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        return cls.compile_with(CompileOptions(), submodel, graph, output)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        settings = Settings.parse(options.settings)
        for name in ("hardware", "timing_cache"):
            if cls.sdk.ahead and getattr(settings, name):
                raise InvalidInput(name, f"is of no use to {cls.sdk.name}: it times nothing, and is told its GPUs by compute_capability")
        found = cls.available()
        if not (found.usable or found.compiles):
            raise EngineUnavailable(f"cannot compile for {cls.target}: {found.reason}")
        lowered = _lower(submodel, graph, settings)
        capabilities = cls._capabilities(settings, lowered.oldest)
        output.mkdir(parents=True, exist_ok=True)
        files = [f"{submodel.name}.engine"]
        with _Compiler(cls.sdk, submodel, settings, options.progress) as compiler:
            compiler.parse(lowered, graph)
            compiler.configure(capabilities)
            compiler.build(output / files[0])
        if settings.weights == "stripped":
            files.append(f"{submodel.name}.onnx")
            with _written(output / files[1]) as file:
                file.write(lowered.content)
        key = {"sdk": found.version, "compute_capability": ",".join(map(_dotted, capabilities)), **settings.key()}
        return Artifact(target=cls.target, submodel=submodel.name, files=tuple(files), key=key, seconds=time.perf_counter() - start)

    @classmethod
    def _capabilities(cls, settings: Settings, oldest: int) -> tuple[int, ...]:
        """What to compile for. `oldest` has the types of the graph.

        Raises InvalidInput for a GPU that the SDK does not know, that lacks a type, or, of TensorRT, that is not in this machine.
        """
        here = sorted({device.capability for device in cuda.devices(cls.sdk.extra)[0]})
        if not cls.sdk.ahead:
            if settings.compute_capability and set(settings.compute_capability) - set(here[:1]):
                raise InvalidInput(
                    "compute_capability",
                    f"{cls.sdk.name} compiles for the GPU of this machine alone ({_dotted(here[0])}): use --target tensorrt-rtx for others",
                )
            return tuple(here[:1])
        members = require(cls.sdk.module, cls.sdk.extra).ComputeCapability.__members__
        known = sorted(int(name[2:]) for name in members if name.startswith("SM"))
        for capability in settings.compute_capability:
            if capability not in known:
                raise InvalidInput(
                    "compute_capability", f"{_dotted(capability)} is none that {cls.sdk.name} knows: {', '.join(map(_dotted, known))}"
                )
        if oldest == OLDEST_FLOAT8 and any(capability < oldest for capability in settings.compute_capability):
            raise InvalidInput("compute_capability", f"fp8 needs {_dotted(oldest)} or later: choose another --quant for older GPUs")
        return (
            settings.compute_capability
            or tuple(capability for capability in here if capability in known)
            or tuple(capability for capability in known if capability >= oldest)
        )

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        settings = LoadSettings.parse(options.settings)
        device = cls._device(options.device)
        artifact = _artifact(Bundle(root), cls.target, submodel.name)
        _require_key(cls.sdk, artifact.key, require(cls.sdk.module, cls.sdk.extra).__version__, device)
        return cls(submodel, _Plan(cls.sdk, submodel, settings, device, root / "engines" / cls.target, artifact, root / submodel.graph))

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

    def __init__(self, submodel: Submodel, plan: _Plan) -> None:
        self.submodel = submodel
        self.device = f"{self.target}:cuda:{plan.device.index} ({plan.device.name})"
        self._plan = plan
        self._slots: WeakKeyDictionary[Slot, _Cache] = WeakKeyDictionary()

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        try:
            self.submodel.signature.bind(inputs)
            if not self.submodel.signature.states:
                return self._plan.run(0, inputs, {})
            return self._run_slot(inputs, slot or Slot())
        except (EngineError, InvalidInput, RuntimeError) as error:  # the SDK's own are RuntimeErrors
            raise EngineError(f"{self.sdk.name} could not run {self.submodel.name}: {error}") from None

    def _run_slot(self, inputs: Mapping[str, Array], slot: Slot) -> dict[str, Array]:
        """Run on a slot's caches: new keys and values are written behind those that the mask says are there."""
        (batch, sequence), total, capacity = inputs["position_ids"].shape, inputs[MASK].shape[1], self._plan.capacity
        if total > capacity:
            raise EngineError(f"{total} positions do not fit its cache of {capacity}: build it with a larger context, or say less")
        if slot not in self._slots:
            self._slots[slot] = _Cache(batch, self._plan)
        cache = self._slots[slot]
        if cache.batch != batch:
            raise EngineError(f"the slot holds {cache.batch} rows, this call has {batch}")
        mask = np.zeros((batch, capacity), np.int64)
        mask[:, :total] = inputs[MASK]
        fixed = dict(inputs) | {MASK: mask, INDICES: np.full(batch, total - sequence, np.int64)}
        return self._plan.run(0 if sequence == 1 else 1, fixed, cache.buffers)

    def trim(self, slot: Slot, length: int) -> None:
        """The next call's mask says how much of the caches is valid, so a slot that begins anew is all there is to forget."""
        if length == 0:
            self._slots.pop(slot, None)

    def close(self) -> None:
        self._slots.clear()
        self._plan.close()


class TensorRTForRTX(TensorRT):
    """The same, compiled for GeForce RTX and RTX PRO GPUs: its kernels are made on the device, when the engine is loaded."""

    target = "tensorrt-rtx"
    rank = 11
    sdk = SDK("tensorrt_rtx", "TensorRT for RTX", "tensorrt-rtx", ahead=True)


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only once it is complete. Raises ResourceExhausted when the disk is full."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(f"the disk filled up while writing {path}: free some space or choose another --output") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Lowered(NamedTuple):
    """A graph as this target takes it, serialized. Weights lie in the canonical files; those that changed their type, in `converted`."""

    content: bytes
    converted: Mapping[str, Array]
    oldest: int
    """The first compute capability that has all its types."""


def _lower(submodel: Submodel, graph: Path, settings: Settings) -> Lowered:
    """The canonical graph in the type that the submodel computes in, a decoder with caches of fixed length."""
    ir = require("onnx_ir", "export")
    try:
        model = ir.load(graph)
    except Exception as error:  # protobuf's and onnx_ir's own
        raise EngineError(f"could not compile {graph}: it cannot be read ({error}). Build the bundle again") from None
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in STANDARD_DOMAINS})
    if foreign and not settings.plugins:
        raise EngineError(
            f"could not compile {submodel.name}: it has operators outside of the standard ({', '.join(foreign[:3])}), which plugins run. "
            "Name the libraries that may be loaded in the setting plugins"
        )
    if submodel.compute != "float32":
        model = to_half(model, submodel.compute, submodel.keep)
    if submodel.signature.states:
        model = with_static_cache(model, submodel.signature, _capacity(submodel.signature, settings))
    converted = {}
    if settings.weights != "stripped":  # those are written with the graph, for the device to read
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor) and tensor.nbytes >= INLINE_BYTES:
                converted[name] = np.frombuffer(tensor.tobytes(), np.uint8)
                value.const_value = ir.ExternalTensor("converted", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name)
    types = {value.dtype for value in model.graph.initializers.values()}
    oldest = OLDEST_FLOAT8 if ir.DataType.FLOAT8E4M3FN in types else OLDEST_FLOAT32
    return Lowered(ir.to_proto(model).SerializeToString(), converted, oldest)


def _capacity(signature: Signature, settings: Settings) -> int:
    """Positions that a decoder's caches hold."""
    longest = signature.dims["total"].max
    if settings.context > longest:
        raise InvalidInput("context", f"is {settings.context}, and the model has {longest} positions")
    return settings.context or longest


class _Compiler:
    """One network on its way to a plan. Everything the SDK reports is collected, for the error that may follow."""

    def __init__(self, sdk: SDK, submodel: Submodel, settings: Settings, progress: Callable[[float, str], None]) -> None:
        self.trt = require(sdk.module, sdk.extra)
        self.sdk, self.submodel, self.settings = sdk, submodel, settings
        self.messages: list[str] = []
        self.progress, self.monitor = progress, _monitor(self.trt, progress)
        self.parser: Any = None
        self.weights: Mapping[str, Array] = {}

    def __enter__(self) -> _Compiler:
        trt = self.trt
        self.logger = _logger(trt, self.messages)
        self.builder = trt.Builder(self.logger)
        if self.builder is None:
            raise self.error("start")
        registry = self.builder.get_plugin_registry()
        for library in self.settings.plugins:
            if registry.load_library(str(library)) is None:
                raise InvalidInput("plugins", f"{library} is no library of plugins that {self.sdk.name} can load")
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.config = self.builder.create_builder_config()
        return self

    def __exit__(self, *exception: object) -> None:
        self.config = self.network = self.builder = self.parser = None  # in this order: each holds on to the next

    def error(self, step: str) -> EngineError:
        """What failed, with the SDK's own words."""
        reason = _reasons(self.messages) or "it gives no reason"
        return EngineError(f"{self.sdk.name} {self.trt.__version__} could not compile {self.submodel.name} ({step}): {reason}")

    def parse(self, lowered: Lowered, graph: Path) -> None:
        """Read the graph, mapping its weights from the folder of `graph`. Attention without a kernel of its own is taken apart."""
        trt = self.trt
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.weights = lowered.converted  # read until the plan is built
        loaded = self.parser.load_model_proto(lowered.content, str(graph)) and all(
            self.parser.load_initializer(name, values.ctypes.data, values.nbytes) for name, values in self.weights.items()
        )
        if not (loaded and self.parser.parse_model_proto()):
            self.messages[:] = [str(self.parser.get_error(index).desc()) for index in range(self.parser.num_errors)] or self.messages
            raise self.error("read its graph")
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = trt.IAttentionOutputLayer
                layer.attention.decomposable = True

    def configure(self, capabilities: tuple[int, ...]) -> None:
        """Flags, limits and profiles."""
        trt, config, settings = self.trt, self.config, self.settings
        if not settings.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if settings.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        for flag in _flags(settings):
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if settings.hardware:
            levels = {"ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS, "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY}
            config.hardware_compatibility_level = levels[settings.hardware]
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
        if self.sdk.ahead:
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
        config.progress_monitor = self.monitor
        for lengths in _profiles(self.submodel.signature, settings):
            profile = self.builder.create_optimization_profile()
            for tensor in _engine_inputs(self.submodel.signature, _capacity_or_none(self.submodel.signature, settings)):
                profile.set_shape(tensor.name, *(tensor.shape({name: found[i] for name, found in lengths.items()}) for i in range(3)))
            if config.add_optimization_profile(profile) < 0:
                raise self.error("set its profile")

    def build(self, path: Path) -> None:
        """Write the plan as it is made, some 64 MiB at a time: it need not fit into memory beside the weights."""
        cache = self._timing_cache()
        with _written(path) as file:
            writer = _writer(self.trt, file)
            done = self.builder.build_serialized_network_to_stream(self.network, self.config, writer)
            for stopped in (self.monitor.stopped, writer.failed):
                if stopped is not None:
                    raise stopped
            if not done:
                raise self.error("build its engine")
            self.progress(1.0, "Engine written")  # the SDK need not do all the steps it announced
        if cache is not None:
            with _written(Path(self.settings.timing_cache)) as file:
                file.write(self.config.get_timing_cache().serialize())

    def _timing_cache(self) -> Any:
        if not self.settings.timing_cache or self.sdk.ahead:
            return None
        path = Path(self.settings.timing_cache)
        cache = self.config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not self.config.set_timing_cache(cache, ignore_mismatch=False):
            cache = self.config.create_timing_cache(b"")  # of another GPU or version: measured anew
            self.config.set_timing_cache(cache, ignore_mismatch=False)
        return cache


def _flags(settings: Settings) -> list[str]:
    """The builder's flags by name."""
    weights = {"engine": [], "refit": ["REFIT"], "stripped": ["STRIP_PLAN", "REFIT_IDENTICAL"], "streamed": ["WEIGHT_STREAMING"]}
    return weights[settings.weights] + (["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"] if settings.compatible else [])


def _capacity_or_none(signature: Signature, settings: Settings) -> int:
    return _capacity(signature, settings) if signature.states else 0


def _engine_inputs(signature: Signature, capacity: int) -> tuple[Tensor, ...]:
    """The inputs that the lowered graph has: those of the canonical one, a decoder's with caches of fixed length."""
    if not capacity:
        return signature.graph_inputs
    batch = next(dim for dim in signature.inputs[0].dims if isinstance(dim, Dim) and dim.name == "batch")

    def fixed(tensor: Tensor) -> Tensor:
        dims = tuple(capacity if isinstance(dim, Dim) and dim.name in ("past", "total") else dim for dim in tensor.dims)
        return tensor.model_copy(update={"dims": dims})

    return (*map(fixed, signature.graph_inputs), Tensor(name=INDICES, dtype="int64", dims=(batch,)))


def _profiles(signature: Signature, settings: Settings) -> list[dict[str, tuple[int, int, int]]]:
    """Shortest, usual and longest length of each dim, for each profile. Raises InvalidInput when a setting exceeds the signature."""
    lengths = {name: (dim.min, dim.opt, dim.max) for name, dim in signature.dims.items()}
    for name, wanted in settings.shapes.items():
        if name not in lengths:
            raise InvalidInput("shapes", f"has '{name}', which is no dim of this submodel: {did_you_mean(name, lengths)}")
        low, _, high = lengths[name]
        if wanted[0] < low or wanted[2] > high:
            raise InvalidInput("shapes", f"has {name}={':'.join(map(str, wanted))}, outside of the model's {low} to {high}")
        lengths[name] = wanted
    if not signature.states:
        return [lengths]
    longest = min(lengths["sequence"][2], _capacity(signature, settings))
    return [lengths | {"sequence": (1, 1, 1)}, lengths | {"sequence": (1, min(PREFILL, longest), longest)}]


def _reasons(messages: list[str]) -> str:
    """What the SDK reported first: the rest follows from it."""
    return "; ".join([text for text in dict.fromkeys(messages) if "catchCudaError" not in text][:2] or messages[:1])


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that collects errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(text)

    return Logger()


def _writer(trt: Any, file: BinaryIO) -> Any:
    """A stream that the SDK writes a plan to. Exceptions may not pass through its code: `failed` holds the first."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failed: BaseException | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except BaseException as error:
                self.failed = self.failed or error
                return 0

    return Writer()


def _monitor(trt: Any, progress: Callable[[float, str], None]) -> Any:
    """A monitor that turns phases within phases into one share done. What `progress` raises ends the build; `stopped` holds it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self.share = 0.0
            self.phases: dict[str, tuple[float, float]] = {}  # the share where each phase is, and what a step of it adds
            self.lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                begin, width = self.phases.get(parent_phase or "", (0.0, 1.0))
                self.phases[phase_name] = begin, width / max(1, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                begin, width = self.phases.get(phase_name, (self.share, 0.0))
                self.phases[phase_name] = begin + width, width
                self.share = min(1.0, max(self.share, begin + width))
                try:
                    progress(self.share, phase_name)
                except BaseException as error:
                    self.stopped = self.stopped or error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases.pop(phase_name, None)

    return Monitor()


def _artifact(bundle: Bundle, target: str, submodel: str) -> Artifact:
    """What the target made of the submodel. Raises EngineError when the bundle has none."""
    for artifact in bundle.manifest.artifacts:
        if (artifact.target, artifact.submodel) == (target, submodel) and artifact.files:
            return artifact
    raise EngineError(f"bundle {bundle.name} holds no {target} engine of {submodel}: build it with --target {target}")


def _require_key(sdk: SDK, key: Mapping[str, str], version: str, device: cuda.Device) -> None:
    """Raise EngineError when an engine compiled under this key cannot run here, saying what differs and what to do."""
    built = [int(part.replace(".", "")) for part in key.get("compute_capability", "").split(",") if part]
    same = key.get("sdk") == version or key.get("compatible") == "version"
    fits = device.capability in built or (key.get("hardware") == "ampere+" and device.capability >= AMPERE)
    if not (same and fits):
        raise EngineError(
            f"the engine was compiled by {sdk.name} {key.get('sdk')} for compute capability {key.get('compute_capability')}, and here are "
            f"{sdk.name} {version} and {device.name} of {_dotted(device.capability)}: build the bundle again"
            + (
                f" with compute_capability={_dotted(device.capability)}"
                if sdk.ahead and not fits
                else " on this machine"
                if not fits
                else ""
            )
        )


class _Plan:
    """An engine on its device: its execution contexts, one for each profile, and the buffers of its inputs and outputs.

    Buffers stay from call to call and grow as needed. Contexts share the memory for what lies between inputs and outputs, which is as
    large as the shapes of a call want, not as those of the profile would. A call that is like the one before is recorded, and replayed
    from then on, where shapes and addresses stay (decoding steps of one slot, the steps of one picture).
    """

    def __init__(
        self, sdk: SDK, submodel: Submodel, settings: LoadSettings, device: cuda.Device, folder: Path, artifact: Artifact, graph: Path
    ) -> None:
        self.trt = require(sdk.module, sdk.extra)
        self.sdk, self.submodel, self.settings, self.device = sdk, submodel, settings, device
        self.messages: list[str] = []
        self.stream = cuda.Stream(device, sdk.extra)
        self.logger = _logger(self.trt, self.messages)
        self.runtime, self.engine = self._deserialize(folder, artifact)
        if artifact.key.get("weights") == "stripped":
            self._refit(folder / artifact.files[1], graph)
        if self.engine.streamable_weights_size > 0:
            self.engine.weight_streaming_budget_v2 = settings.weight_budget or self.engine.get_weight_streaming_automatic_budget()
        self.capacity = self._capacity()
        self.buffers: dict[str, cuda.Buffer] = {}
        self.memory = cuda.Buffer(self.stream)
        self.cache: Any = None
        self.contexts = [self._context(profile) for profile in range(self.engine.num_optimization_profiles)]
        self.last: list[_Call | None] = [None] * len(self.contexts)
        self.recording = settings.graphs and not sdk.ahead  # TensorRT for RTX records by itself

    def _error(self, what: str) -> EngineError:
        reasons = _reasons(self.messages)
        return EngineError(f"{what} ({reasons})" if reasons else what)

    def _deserialize(self, folder: Path, artifact: Artifact) -> tuple[Any, Any]:
        path = folder / artifact.files[0]
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise EngineError(f"{self.sdk.name} could not load {path}: {error.strerror}. Copy or build the bundle again") from None
        runtime = self.trt.Runtime(self.logger)
        if artifact.key.get("compatible") == "version" and self.settings.lean_runtime is not None:
            runtime = runtime.load_runtime(str(self.settings.lean_runtime))
        for library in self.settings.plugins:
            runtime.get_plugin_registry().load_library(str(library))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._error(f"{self.sdk.name} {self.trt.__version__} could not load {path}: it is damaged, or of another version or GPU")
        return runtime, engine

    def _refit(self, lowered: Path, graph: Path) -> None:
        """Give a stripped engine the weights that lie beside the canonical graph."""
        refitter = self.trt.Refitter(self.engine, self.logger)
        parser = self.trt.OnnxParserRefitter(refitter, self.logger)
        if not (parser.refit_from_bytes(lowered.read_bytes(), str(graph)) and refitter.refit_cuda_engine()):
            raise self._error(f"{self.sdk.name} could not give {self.submodel.name} its weights from {graph.parent}")

    def _capacity(self) -> int:
        """Positions that a decoder's caches hold; 0 of other submodels."""
        states = self.submodel.signature.states
        for state in states:
            if self.engine.get_aliased_input_tensor(state.present.name) != state.past.name:
                raise EngineError(f"the engine of {self.submodel.name} does not update {state.past.name} in place: build the bundle again")
        return int(self.engine.get_tensor_shape(states[0].past.name)[2]) if states else 0

    def _context(self, profile: int) -> Any:
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.sdk.ahead:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self.settings.graphs:
                config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self.settings.runtime_cache is not None:
                config.set_runtime_cache(self._runtime_cache(config))
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, self.stream.handle):
            raise self._error(f"{self.sdk.name} could not prepare {self.submodel.name} to run")
        self.stream.wait()
        return context

    def _runtime_cache(self, config: Any) -> Any:
        """Kernels made in earlier runs on this device, where the file is of this version and device."""
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            path = self.settings.runtime_cache
            if path is not None and path.is_file():
                self.cache.deserialize(path.read_bytes())
        return self.cache

    def run(self, profile: int, inputs: Mapping[str, Array], states: Mapping[str, cuda.Buffer]) -> dict[str, Array]:
        """Copy the inputs to the device, run, and return copies of the outputs. `states` are read and written where they are."""
        self.stream.select()
        self.messages.clear()
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        call = self._prepare(profile, arrays, states)
        outputs = {name: np.empty(shape, dtype) for name, (shape, dtype) in call.outputs.items()}
        try:
            for name, array in arrays.items():
                self.stream.to_device(self.buffers[name].address, array)
            if call.graph is not None:
                call.graph.launch()
            else:
                self._enqueue(profile)
            for name, array in outputs.items():
                self.stream.to_host(array, self.buffers[name].address)
        finally:
            self.stream.wait()  # copies still use these arrays
        return outputs

    def _prepare(self, profile: int, arrays: Mapping[str, Array], states: Mapping[str, cuda.Buffer]) -> _Call:
        """Shapes and addresses of a call: those of the last one where nothing changed, recorded when it comes a second time."""
        context = self.contexts[profile]
        shapes = {name: array.shape for name, array in arrays.items()}
        for name, array in arrays.items():
            self._buffer(name).reserve(array.nbytes)
        last = self.last[profile]
        if last is not None and last.shapes == shapes and last.places == self._places(states):
            if self.recording and last.graph is None:
                self._record(profile, last)
            return last
        self.last[profile] = None
        self._set_shapes(context, shapes, states)
        outputs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for tensor in self.submodel.signature.outputs:
            shape, dtype = tuple(context.get_tensor_shape(tensor.name)), np.dtype(tensor.dtype)
            outputs[tensor.name] = shape, dtype
            self._buffer(tensor.name).reserve(int(np.prod(shape)) * dtype.itemsize)
        self.memory.reserve(context.update_device_memory_size_for_shapes())
        places = self._places(states)
        for name, address in places.items():
            if name:
                context.set_tensor_address(name, address)
        for state in self.submodel.signature.states:
            context.set_tensor_address(state.present.name, places[state.past.name])
        context.set_device_memory(self.memory.address, self.memory.nbytes)
        self.last[profile] = call = _Call(shapes, places, outputs)
        return call

    def _record(self, profile: int, call: _Call) -> None:
        """Record the call, where the engine does nothing that cannot be recorded, such as holding more memory as it goes."""
        try:
            call.graph = self.stream.record(lambda: self._enqueue(profile))
        except EngineError:
            self.recording = False

    def _places(self, states: Mapping[str, cuda.Buffer]) -> dict[str, int]:
        """The address of everything that a call reads and writes, that of the memory between under the name ""."""
        return {name: buffer.address for name, buffer in {**self.buffers, **states, "": self.memory}.items()}

    def _set_shapes(self, context: Any, shapes: Mapping[str, tuple[int, ...]], states: Mapping[str, cuda.Buffer]) -> None:
        caches = {name: self.cache_shape(name, next(iter(shapes.values()))[0]) for name in states}
        for name, shape in {**shapes, **caches}.items():
            if not context.set_input_shape(name, shape):
                raise self._error(f"{name} of shape {list(shape)} is outside of what the engine was compiled for")
        missing = context.infer_shapes()
        if missing:
            raise self._error(f"its inputs {', '.join(missing)} do not determine the shapes of its outputs")

    def _enqueue(self, profile: int) -> None:
        if not self.contexts[profile].execute_async_v3(self.stream.handle):
            raise self._error("the engine refused the work")

    def _buffer(self, name: str) -> cuda.Buffer:
        return self.buffers.setdefault(name, cuda.Buffer(self.stream))

    def cache_shape(self, name: str, batch: int) -> tuple[int, ...]:
        """[batch, heads, capacity, size] of a decoder's cache."""
        return (batch, *(int(length) for length in tuple(self.engine.get_tensor_shape(name))[1:]))

    def cache_nbytes(self, name: str, batch: int) -> int:
        return int(np.prod(self.cache_shape(name, batch))) * int(self.engine.get_tensor_dtype(name).itemsize)

    def close(self) -> None:
        """Free everything; keep the kernels that were made where there is a file for them. May be called twice."""
        if self.cache is not None and self.settings.runtime_cache is not None:
            with _written(self.settings.runtime_cache) as file:
                file.write(self.cache.serialize())
        self.cache = None
        for call in self.last:
            if call is not None and call.graph is not None:
                call.graph.close()
        self.last, self.contexts = [], []
        self.engine = self.runtime = None
        for buffer in (*self.buffers.values(), self.memory):
            buffer.close()
        self.buffers = {}
        self.stream.close()


@dataclass
class _Call:
    """What a context is set to: shapes of the inputs, addresses of everything, shapes and dtypes of the outputs."""

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, int]
    outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    graph: cuda.Recorded | None = None


class _Cache:
    """The caches of one slot, zero at first: [batch, heads, capacity, size] each, read as past and written as present."""

    def __init__(self, batch: int, plan: _Plan) -> None:
        self.batch = batch
        self.buffers: dict[str, cuda.Buffer] = {}
        plan.stream.select()
        for state in plan.submodel.signature.states:
            name = state.past.name
            nbytes = plan.cache_nbytes(name, batch)
            self.buffers[name] = cuda.Buffer(plan.stream)
            plan.stream.zero(self.buffers[name].reserve(nbytes), nbytes)
