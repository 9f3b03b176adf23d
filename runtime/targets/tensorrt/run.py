"""A plan on its device: execution contexts, buffers, the caches of slots, and recorded calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.manifest import LARGEST_GRAPH, Artifact, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Compiled
from runtime.errors import EngineError
from runtime.files import open_regular, read_regular, written
from runtime.optional import require
from runtime.targets.nvidia import cuda
from runtime.targets.tensorrt.sdk import SDK, logger, reasons
from runtime.targets.tensorrt.settings import TensorRTLoadSettings


class LoadedEngine:
    """An engine on its device: its execution contexts, one for each profile, and the buffers of its inputs and outputs.

    Buffers are kept from call to call and grow as needed. Contexts share the memory for intermediate values, which is
    sized for the shapes of a call, not for those of the profile. When a call repeats the one before, with the same
    shapes and addresses (decoding steps of one slot, the steps of one picture), it is recorded and replayed from then
    on.
    """

    def __init__(
        self,
        sdk: SDK,
        submodel: Submodel,
        settings: TensorRTLoadSettings,
        device: cuda.Device,
        compiled: Compiled,
        graph: Path,
    ) -> None:
        artifact, folder = compiled.artifact, compiled.folder
        self.trt = require(sdk.module, sdk.extra)
        self.sdk, self.submodel, self.settings, self.device = sdk, submodel, settings, device
        self.messages: list[str] = []
        self.stream = cuda.Stream(device, sdk.extra)
        self.logger = logger(self.trt, self.messages)
        self.runtime, self.engine = self._deserialize(folder, artifact)
        if artifact.key.get("weights") == "stripped":
            self._refit(folder / artifact.files[1], graph)
        if self.engine.streamable_weights_size > 0:
            self.engine.weight_streaming_budget_v2 = (
                settings.weight_budget or self.engine.get_weight_streaming_automatic_budget()
            )
        self.capacity = self._capacity()
        self.buffers: dict[str, cuda.Buffer] = {}
        self.memory = cuda.Buffer(self.stream)
        self.cache: Any = None
        self.contexts = [self._context(profile) for profile in range(self.engine.num_optimization_profiles)]
        self.last: list[Call | None] = [None] * len(self.contexts)
        self.recording = settings.graphs and not sdk.ahead  # TensorRT for RTX records by itself

    def _error(self, what: str) -> EngineError:
        reason = reasons(self.messages)
        return EngineError(f"{what} ({reason})" if reason else what)

    def _deserialize(self, folder: Path, artifact: Artifact) -> tuple[Any, Any]:
        path = folder / artifact.files[0]
        try:
            with open_regular(path) as file:
                plan = file.read()
        except OSError as error:
            raise EngineError(
                f"{self.sdk.name} could not load {path}: {error.strerror}. Copy or build the bundle again"
            ) from None
        runtime = self.trt.Runtime(self.logger)
        if artifact.key.get("compatible") == "version" and self.settings.lean_runtime is not None:
            runtime = runtime.load_runtime(str(self.settings.lean_runtime))
        for library in self.settings.plugins:
            runtime.get_plugin_registry().load_library(str(library))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._error(
                f"{self.sdk.name} {self.trt.__version__} could not load {path}: it is damaged, or of another version "
                "or GPU"
            )
        return runtime, engine

    def _refit(self, lowered: Path, graph: Path) -> None:
        """Load the weights of a stripped engine from the canonical graph's files."""
        refitter = self.trt.Refitter(self.engine, self.logger)
        parser = self.trt.OnnxParserRefitter(refitter, self.logger)
        if not (
            parser.refit_from_bytes(read_regular(lowered, LARGEST_GRAPH), str(graph)) and refitter.refit_cuda_engine()
        ):
            raise self._error(f"{self.sdk.name} could not give {self.submodel.name} its weights from {graph.parent}")

    def _capacity(self) -> int:
        """Positions that a decoder's caches hold; 0 for other submodels."""
        states = self.submodel.signature.states
        for state in states:
            if self.engine.get_aliased_input_tensor(state.present.name) != state.past.name:
                raise EngineError(
                    f"the engine of {self.submodel.name} does not update {state.past.name} in place: build the bundle "
                    "again"
                )
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
        """The file of kernels that were compiled in earlier runs, if it is of this version and device."""
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            path = self.settings.runtime_cache
            if path is not None and path.is_file():
                self.cache.deserialize(path.read_bytes())
        return self.cache

    def run(self, profile: int, inputs: Mapping[str, Array], states: Mapping[str, cuda.Buffer]) -> dict[str, Array]:
        """Copy the inputs to the device, run, and return copies of the outputs. `states` are read and written where
        they are.
        """
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

    def _prepare(self, profile: int, arrays: Mapping[str, Array], states: Mapping[str, cuda.Buffer]) -> Call:
        """Set shapes and addresses of a call; those of the last call are kept where nothing changed, and it is recorded
        when it comes a second time.
        """
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
        self.last[profile] = call = Call(shapes, places, outputs)
        return call

    def _record(self, profile: int, call: Call) -> None:
        """Record the call. Engines whose work cannot be recorded, for instance because they allocate memory while they
        run, are not.
        """
        try:
            call.graph = self.stream.record(lambda: self._enqueue(profile))
        except EngineError:
            self.recording = False

    def _places(self, states: Mapping[str, cuda.Buffer]) -> dict[str, int]:
        """The address of everything that a call reads and writes; that of the memory for intermediate values has the
        name "".
        """
        return {name: buffer.address for name, buffer in {**self.buffers, **states, "": self.memory}.items()}

    def _set_shapes(
        self, context: Any, shapes: Mapping[str, tuple[int, ...]], states: Mapping[str, cuda.Buffer]
    ) -> None:
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
        """Free everything, and save the compiled kernels where there is a file for them. May be called twice."""
        if self.cache is not None and self.settings.runtime_cache is not None:
            with written(self.settings.runtime_cache) as file:
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
class Call:
    """The state of a context: shapes of the inputs, addresses of everything, shapes and dtypes of the outputs."""

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, int]
    outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    graph: cuda.Recorded | None = None


class Cache:
    """The caches of one slot, zero at first: [batch, heads, capacity, size] each, read as past and written
    as present.
    """

    def __init__(self, batch: int, loaded: LoadedEngine) -> None:
        self.batch, self.loaded = batch, loaded
        self.buffers: dict[str, cuda.Buffer] = {}
        loaded.stream.select()
        for state in loaded.submodel.signature.states:
            name = state.past.name
            nbytes = loaded.cache_nbytes(name, batch)
            self.buffers[name] = cuda.Buffer(loaded.stream)
            loaded.stream.zero(self.buffers[name].reserve(nbytes), nbytes)

    def copied(self) -> Cache:
        """A copy of the cache."""
        other = Cache(self.batch, self.loaded)
        for name, buffer in self.buffers.items():
            self.loaded.stream.copy(other.buffers[name].address, buffer.address, buffer.nbytes)
        self.loaded.stream.wait()
        return other
