"""TensorRT, and TensorRT for RTX, which compiles ahead of time on machines without a GPU: one implementation over their common Python API.

Networks are strongly typed: every layer computes in the type that the graph says. Lengths between the minimum and the maximum of the
signature are one optimization profile; decoders have two, for one position and for many, and caches of fixed length updated in place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from runtime import cuda
from runtime.bundle import Artifact, Submodel
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, MissingDependency, did_you_mean
from runtime.lowering import to_half
from runtime.optional import require
from runtime.signature import Array, Dim, Signature, Tensor
from runtime.static_cache import INDICES, with_static_cache

STANDARD_DOMAINS: Final = ("", "ai.onnx")
OLDEST_FLOAT32: Final = 80
"""TensorRT for RTX multiplies float32 matrices from compute capability 8.0 on; it refuses them for 7.5."""
PREFILL: Final = 256
"""Usual number of new positions in the profile for many: about one picture and a question."""
UNITS: Final[Mapping[str, int]] = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Settings(BaseModel):
    """What `compile_with` takes. Texts, as a command line gives them.

    `compute_capability`: the GPUs to compile for, "8.9,12.0"; by default this machine's, or all that the SDK knows where it has none.
    `shapes`: narrower lengths than the signature's, "batch=1:2:8,height=64:64:128" (min:opt:max): less memory, faster kernels.
    `context`: positions that a decoder's cache holds; by default all that the model has.
    `workspace`: memory that a layer may use while it runs, "4GiB"; by default all.
    `weights`: "engine" stores them in the engine; "refit" lets them be exchanged later; "stripped" leaves them in the bundle's own files,
    from where they are read when the engine is loaded; "streamed" lets loading keep a part of them in the memory of the host.
    `compatible`: "version" makes an engine that later versions of the SDK load.
    `hardware`: "ampere+" makes one for all GPUs from Ampere on, "same" for those of the same compute capability.
    `timing_cache`: a file in which the times of kernels are kept between compilations. TensorRT for RTX measures none.
    `optimization_level`: 0 (quick to compile) to 5 (quick to run).
    `plugins`: libraries that operators outside of the standard may be taken from. They run as native code: name only those you trust.
    `tf32`: lets float32 products be computed in TensorFloat-32, of 10 bits of mantissa.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    compute_capability: tuple[int, ...] = ()
    shapes: Mapping[str, tuple[int, int, int]] = Field(default_factory=dict)
    context: int = Field(default=0, ge=0)
    workspace: int = Field(default=0, ge=0)
    weights: Literal["engine", "refit", "stripped", "streamed"] = "engine"
    compatible: Literal["", "version"] = ""
    hardware: Literal["", "ampere+", "same"] = ""
    timing_cache: str = ""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    plugins: tuple[Path, ...] = ()
    tf32: bool = False

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> Settings:
        """Settings from texts. Raises InvalidInput naming the one that is wrong."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            known = f" (known: {', '.join(sorted(cls.model_fields))})" if found["type"] == "extra_forbidden" else ""
            raise InvalidInput(name, f"{found['msg'].removeprefix('Value error, ')}{known}") from None

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

    @field_validator("workspace", mode="before")
    @classmethod
    def _bytes(cls, text: str) -> int:
        number = text.rstrip("KMGiB")
        if not number.isdecimal() or text[len(number) :] not in UNITS:
            raise ValueError(f"is '{text}', expected a size such as 512MiB or 4GiB")
        return int(number) * UNITS[text[len(number) :]]

    @field_validator("plugins", mode="before")
    @classmethod
    def _paths(cls, text: str) -> tuple[Path, ...]:
        return tuple(Path(part) for part in text.split(",") if part)

    def key(self) -> dict[str, str]:
        """What of the settings decides where an engine can be loaded, and how."""
        return {"weights": self.weights} | {
            name: value for name, value in (("compatible", self.compatible), ("hardware", self.hardware)) if value
        }


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
        found = cls.available()
        if not (found.usable or found.compiles):
            raise EngineUnavailable(f"cannot compile for {cls.target}: {found.reason}")
        capabilities = cls._capabilities(settings)
        lowered = _lower(submodel, graph, settings)
        output.mkdir(parents=True, exist_ok=True)
        with _Compiler(cls.sdk, submodel, settings, options.progress) as compiler:
            compiler.parse(lowered, graph)
            compiler.configure(capabilities)
            plan = compiler.build()
        files = {f"{submodel.name}.engine": plan}
        if settings.weights == "stripped":
            files[f"{submodel.name}.onnx"] = lowered
        for name, content in files.items():
            _write(output / name, content)
        key = {"sdk": found.version, "compute_capability": ",".join(map(_dotted, capabilities)), **settings.key()}
        return Artifact(target=cls.target, submodel=submodel.name, files=tuple(files), key=key, seconds=time.perf_counter() - start)

    @classmethod
    def _capabilities(cls, settings: Settings) -> tuple[int, ...]:
        """What to compile for. Raises InvalidInput for a GPU that the SDK does not know, or, of TensorRT, is not in this machine."""
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
        return (
            settings.compute_capability
            or tuple(capability for capability in here if capability in known)
            or tuple(capability for capability in known if capability >= OLDEST_FLOAT32)
        )

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        raise EngineUnavailable(f"{cls.target} compiles for other machines, and does not run here: {cls.available().reason}")

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        raise EngineError(f"{self.target} does not run here")


class TensorRTForRTX(TensorRT):
    """The same, compiled for GeForce RTX and RTX PRO GPUs: its kernels are made on the device, when the engine is loaded."""

    target = "tensorrt-rtx"
    rank = 11
    sdk = SDK("tensorrt_rtx", "TensorRT for RTX", "tensorrt-rtx", ahead=True)


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _write(path: Path, content: Any) -> None:
    """Under its own name only once it is complete."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def _lower(submodel: Submodel, graph: Path, settings: Settings) -> bytes:
    """The canonical graph as this target takes it, serialized: weights stay in the files beside `graph`."""
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
    lowered: bytes = ir.to_proto(model).SerializeToString()
    return lowered


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
        self.monitor = _monitor(self.trt, progress)
        self.parser: Any = None

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
        reason = "; ".join(dict.fromkeys(self.messages[-3:])) or "it gives no reason"
        return EngineError(f"{self.sdk.name} {self.trt.__version__} could not compile {self.submodel.name} ({step}): {reason}")

    def parse(self, lowered: bytes, graph: Path) -> None:
        """Read the graph, its weights from the folder of `graph`. Attention without a kernel of its own is taken apart."""
        trt = self.trt
        self.parser = trt.OnnxParser(self.network, self.logger)
        if not self.parser.parse(lowered, str(graph)):
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

    def build(self) -> Any:
        """The plan: a buffer of bytes."""
        cache = self._timing_cache()
        plan = self.builder.build_serialized_network(self.network, self.config)
        if self.monitor.stopped is not None:
            raise self.monitor.stopped
        if plan is None:
            raise self.error("build its engine")
        if cache is not None:
            _write(Path(self.settings.timing_cache), self.config.get_timing_cache().serialize())
        return plan

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


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that collects errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(text)

    return Logger()


def _monitor(trt: Any, progress: Callable[[float, str], None]) -> Any:
    """A monitor that turns phases within phases into one share done. What `progress` raises ends the build; `stopped` holds it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self.share = 0.0
            self.spans: dict[str, tuple[float, float, int]] = {}
            self.lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                begin, end, _ = self.spans.get(parent_phase or "", (0.0, 1.0, 1))
                self.spans[phase_name] = max(begin, self.share), end, max(1, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                begin, end, steps = self.spans.get(phase_name, (self.share, self.share, 1))
                self.share = max(self.share, begin + (end - begin) * min(1.0, (step + 1) / steps))
                try:
                    progress(self.share, phase_name)
                except BaseException as error:
                    self.stopped = self.stopped or error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.spans.pop(phase_name, None)

    return Monitor()
