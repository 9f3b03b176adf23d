"""From a graph to a plan: parser, flags, optimization profiles, progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.errors import EngineError, InvalidInput, did_you_mean
from runtime.files import written
from runtime.optional import require
from runtime.targets.lowering.static_cache import INDICES, capacity
from runtime.targets.tensorrt.lower import Lowered
from runtime.targets.tensorrt.sdk import SDK, logger, reasons
from runtime.targets.tensorrt.settings import TensorRTSettings

PREFILL: Final = 256
"""Usual number of new positions in the profile for prompts: about one picture and a question."""


class Compiler:
    """Compiles one network to a plan. Everything the SDK reports is collected for error messages."""

    def __init__(
        self, sdk: SDK, submodel: Submodel, settings: TensorRTSettings, progress: Callable[[float, str], None]
    ) -> None:
        self.trt = require(sdk.module, sdk.extra)
        self.sdk, self.submodel, self.settings = sdk, submodel, settings
        self.messages: list[str] = []
        self.progress, self.monitor = progress, _monitor(self.trt, progress)
        self.parser: Any = None
        self.weights: Mapping[str, Array] = {}

    def __enter__(self) -> Compiler:
        trt = self.trt
        self.logger = logger(trt, self.messages)
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
        """An error with the failed step and the SDK's own message."""
        reason = reasons(self.messages) or "it gives no reason"
        return EngineError(
            f"{self.sdk.name} {self.trt.__version__} could not compile {self.submodel.name} ({step}): {reason}"
        )

    def parse(self, lowered: Lowered, graph: Path) -> None:
        """Read the graph and map its weights from the folder of `graph`. Attention without a kernel of its own is
        decomposed.
        """
        trt = self.trt
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.weights = lowered.converted  # read until the plan is built
        loaded = self.parser.load_model_proto(lowered.content, str(graph)) and all(
            self.parser.load_initializer(name, values.ctypes.data, values.nbytes)
            for name, values in self.weights.items()
        )
        if not (loaded and self.parser.parse_model_proto()):
            self.messages[:] = [
                str(self.parser.get_error(index).desc()) for index in range(self.parser.num_errors)
            ] or self.messages
            raise self.error("read its graph")
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = trt.IAttentionOutputLayer
                layer.attention.decomposable = True

    def configure(self, capabilities: tuple[int, ...]) -> None:
        """Set flags, limits, the GPUs to compile for and optimization profiles."""
        self._set_options()
        self._set_gpus(capabilities)
        self.config.progress_monitor = self.monitor
        for lengths in _profiles(self.submodel.signature, self.settings):
            self._add_profile(lengths)

    def _set_options(self) -> None:
        trt, config, settings = self.trt, self.config, self.settings
        if not settings.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if settings.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        for flag in _flags(settings):
            config.set_flag(getattr(trt.BuilderFlag, flag))
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)

    def _set_gpus(self, capabilities: tuple[int, ...]) -> None:
        trt, config = self.trt, self.config
        if self.settings.hardware:
            levels = {
                "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
                "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
            }
            config.hardware_compatibility_level = levels[self.settings.hardware]
        if self.sdk.ahead:
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)

    def _add_profile(self, lengths: Mapping[str, tuple[int, int, int]]) -> None:
        """Add a profile with the shortest, usual and longest length of each dim. Raises EngineError."""
        signature, profile = self.submodel.signature, self.builder.create_optimization_profile()
        for tensor in _engine_inputs(signature, _capacity_or_none(signature, self.settings)):
            shapes = [tensor.shape({name: found[i] for name, found in lengths.items()}) for i in range(3)]
            profile.set_shape(tensor.name, *shapes)
        if self.config.add_optimization_profile(profile) < 0:
            raise self.error("set its profile")

    def build(self, path: Path) -> None:
        """Write the plan as it is made, some 64 MiB at a time: it need not fit into memory beside the weights."""
        cache = self._timing_cache()
        with written(path) as file:
            writer = _writer(self.trt, file)
            done = self.builder.build_serialized_network_to_stream(self.network, self.config, writer)
            for stopped in (self.monitor.stopped, writer.failed):
                if stopped is not None:
                    raise stopped
            if not done:
                raise self.error("build its engine")
            self.progress(1.0, "Engine written")  # the SDK need not do all the steps it announced
        if cache is not None:
            with written(Path(self.settings.timing_cache)) as file:
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


def _flags(settings: TensorRTSettings) -> list[str]:
    """The builder's flags by name."""
    weights = {
        "engine": [],
        "refit": ["REFIT"],
        "stripped": ["STRIP_PLAN", "REFIT_IDENTICAL"],
        "streamed": ["WEIGHT_STREAMING"],
    }
    return weights[settings.weights] + (["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"] if settings.compatible else [])


def _capacity_or_none(signature: Signature, settings: TensorRTSettings) -> int:
    return capacity(signature, settings.context) if signature.states else 0


def _engine_inputs(signature: Signature, capacity: int) -> tuple[Tensor, ...]:
    """The inputs of the lowered graph: those of the canonical one; a decoder's caches have a fixed length."""
    if not capacity:
        return signature.graph_inputs
    port = signature.decoder

    def fixed(tensor: Tensor) -> Tensor:
        dims = tuple(
            capacity if isinstance(dim, Dim) and dim.name in (port.past, port.total) else dim for dim in tensor.dims
        )
        return tensor.model_copy(update={"dims": dims})

    return (
        *map(fixed, signature.graph_inputs),
        Tensor(name=INDICES, dtype="int64", dims=(signature.dims[port.batch],)),
    )


def _profiles(signature: Signature, settings: TensorRTSettings) -> list[dict[str, tuple[int, int, int]]]:
    """Shortest, usual and longest length of each dim, for each profile. Raises InvalidInput when a setting exceeds the
    signature.
    """
    lengths = {
        name: (dim.min, dim.opt, dim.max)
        for name, dim in signature.dims.items()
        if signature.port is not None or not dim.sum_of
    }
    for name, wanted in settings.shapes.items():
        if name not in lengths:
            raise InvalidInput(
                "shapes", f"has '{name}', which is no dim of this submodel: {did_you_mean(name, lengths)}"
            )
        low, _, high = lengths[name]
        if wanted[0] < low or wanted[2] > high:
            raise InvalidInput(
                "shapes", f"has {name}={':'.join(map(str, wanted))}, outside of the model's {low} to {high}"
            )
        lengths[name] = wanted
    if signature.port is None:
        return [signature.ranges(lengths)]
    sequence = signature.port.sequence
    longest = min(lengths[sequence][2], capacity(signature, settings.context))
    return [lengths | {sequence: (1, 1, 1)}, lengths | {sequence: (1, min(PREFILL, longest), longest)}]


def _writer(trt: Any, file: BinaryIO) -> Any:
    """A stream that the SDK writes a plan to. Exceptions may not pass through its code, so `failed` holds the first
    one.
    """

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
    """A progress monitor that turns nested phases into one share done. What `progress` raises ends the build; `stopped`
    holds it.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self.share = 0.0
            self.phases: dict[
                str, tuple[float, float]
            ] = {}  # the share where each phase is, and what a step of it adds
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
