"""OpenVINO: reads the canonical graph as it is; KV caches become pages (on the CPU) or states of the model, updated in place.

Nothing is stored at build time: OpenVINO maps the graph and its weights in a second or so and compiles for the processor it finds, so a
bundle never carries an engine that does not fit. Compiling at build time proves that the graph is accepted, and measures it.

Numbers are what the bundle says, not what the plugin likes on this processor: bfloat16, a cache of 8 bits, inputs rounded to 8 bits. Who
loads an engine may decide otherwise by `Options.settings`: `KV_CACHE_PRECISION` "u8" makes the cache a quarter as large.

On the CPU, graphs with quantized activations are compiled for each shape they are called with: at dynamic shapes the plugin of 2026.4
computes int8 convolutions of Stable Diffusion wrongly (3 dB). See docs/decisions/0011-int8-at-fixed-shapes.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle import Artifact, Submodel
from runtime.engine import Availability, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, MissingDependency
from runtime.openvino_graph import BEAMS, halve_attention, keep_states, use_zero_points
from runtime.optional import require
from runtime.paged_cache import Pages, fits, has_pages, use_pages
from runtime.signature import Array

Shapes = Mapping[str, tuple[int, ...]]
"""Of each input, by name."""
GROUP: Final = 64
"""Inputs of a layer that share a scale where they are rounded to 8 bits. Layers whose int4 blocks are no multiple of it, or whose int8
weights have fewer inputs, are computed in float. See docs/decisions/0009-dynamic-activations.md."""


@cache
def _core() -> Any:
    core = require("openvino", "openvino").Core()
    return core


SHAPES: Final = 2
"""Shapes that a submodel is kept compiled for where each needs its own; the one not used for longest goes first."""


class OpenVINO(Engine):
    """A compiled model; one infer request for stateless calls, or one for each shape; one for each slot."""

    target = "openvino"
    rank = 20

    def __init__(self, submodel: Submodel, compiled: Any, device: str, fix: Callable[[Shapes], Any] | None = None) -> None:
        self.submodel = submodel
        self.device = device
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._fix = fix
        self._fixed: dict[tuple[tuple[str, tuple[int, ...]], ...], Any] = {}
        if fix is not None:
            self._fixed[tuple(sorted(_usual(submodel).items()))] = self._request
        self._slots: WeakKeyDictionary[Slot, _Held | Pages] = WeakKeyDictionary()

    @classmethod
    def available(cls) -> Availability:
        try:
            sdk, core = require("openvino", "openvino"), _core()
        except MissingDependency as error:
            return Availability(False, reason=str(error))
        names = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
        return Availability(
            bool(names), tuple(f"{name} ({full})" for name, full in names.items()), "" if names else "no device", sdk.__version__
        )

    @classmethod
    def compile(cls, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        _compile(submodel, graph, Options())
        return Artifact(target=cls.target, submodel=submodel.name, seconds=time.perf_counter() - start)

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        graph = root / submodel.graph
        compiled, device = _compile(submodel, graph, options)
        if not _needs_shape(submodel, options):
            return cls(submodel, compiled, device)
        return cls(submodel, compiled, device, lambda shapes: _compile(submodel, graph, options, shapes)[0])

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        request, feed = self._request, dict(inputs)
        try:
            if self._fix is not None:
                request = self._for(self._fix, {name: array.shape for name, array in inputs.items()})
            elif self.submodel.signature.states:
                batch = len(next(iter(inputs.values())))
                held = self._slot(slot or Slot(), batch)
                request = held.request
                feed = held.feed(inputs) if isinstance(held, Pages) else feed | {BEAMS: np.arange(batch, dtype=np.int32)}
            results = request.infer(feed, share_inputs=True)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"OpenVINO could not run {self.submodel.name}: {error}") from None
        return {tensor.name: np.array(results[tensor.name]) for tensor in self.submodel.signature.outputs}

    def trim(self, slot: Slot, length: int) -> None:
        if length == 0:
            self._slots.pop(slot, None)
        held = self._slots.get(slot)
        if held is None or isinstance(held, Pages):  # each call says how much of the pages is valid
            return
        sdk = require("openvino", "openvino")
        for state in held.request.query_state():
            kept = np.ascontiguousarray(state.state.data[:, :, :length])
            state.state = sdk.Tensor(kept)

    def close(self) -> None:
        self._slots.clear()
        self._fixed.clear()
        self._request = self._compiled = None

    def _for(self, fix: Callable[[Shapes], Any], shapes: Shapes) -> Any:
        """The request of the model compiled for these shapes, compiled now where it is not."""
        key = tuple(sorted(shapes.items()))
        request = self._fixed.pop(key, None)
        if request is None:
            while len(self._fixed) >= SHAPES:
                del self._fixed[next(iter(self._fixed))]
            self._request = self._compiled = None  # the usual shape's is held by the table alone
            request = fix(shapes).create_infer_request()
        self._fixed[key] = request
        return request

    def _slot(self, slot: Slot, batch: int) -> _Held | Pages:
        """What holds the slot's states. The plugin would read beyond them for rows that they do not have."""
        if slot not in self._slots:
            paged = has_pages(self._compiled)
            self._slots[slot] = Pages(self._compiled, batch) if paged else _Held(self._compiled.create_infer_request(), batch)
        held = self._slots[slot]
        if held.batch != batch:
            raise EngineError(f"OpenVINO could not run {self.submodel.name}: the slot holds {held.batch} rows, this call has {batch}")
        return held


class _Held(NamedTuple):
    """What a slot has where there are no pages: an infer request with its states, and their number of rows."""

    request: Any
    batch: int


def _needs_shape(submodel: Submodel, options: Options) -> bool:
    """Whether the graph has quantized activations, shapes that vary, and the CPU to run on."""
    signature = submodel.signature
    if (options.device or "CPU") != "CPU":
        return False
    return not signature.states and "W8A8" in submodel.precision and any(not isinstance(d, int) for t in signature.inputs for d in t.dims)


def _usual(submodel: Submodel) -> Shapes:
    """The shapes that are expected most."""
    inputs = submodel.signature.inputs
    lengths = {dim.name: dim.opt for tensor in inputs for dim in tensor.dims if not isinstance(dim, int)}
    return {tensor.name: tensor.shape(lengths) for tensor in inputs}


def _compile(submodel: Submodel, graph: Path, options: Options, shapes: Shapes | None = None) -> tuple[Any, str]:
    """Compile for the device, at these shapes, or the usual ones, where it needs fixed ones; and what the device is."""
    if shapes is None and _needs_shape(submodel, options):
        shapes = _usual(submodel)
    core = _core()
    device = options.device or "CPU"
    if device.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
        raise EngineUnavailable(f"OpenVINO has no device '{device}' here: it found {', '.join(core.available_devices) or 'none'}")
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        config |= _numbers(submodel.dynamic, _half(core, submodel)) | (
            {"INFERENCE_NUM_THREADS": options.threads} if options.threads else {}
        )
    try:
        compiled = _compiled(core, submodel, graph, device, config | dict(options.settings), shapes)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"OpenVINO could not compile {graph}: {error}") from None
    name = f"openvino:{device} ({core.get_property(device, 'FULL_DEVICE_NAME')})"
    if device == "CPU" and _half(core, submodel):
        name += " in bfloat16"
    elif device == "CPU" and submodel.bfloat16 and _has_bfloat16(core):
        name += " with attention in bfloat16"
    if device == "CPU" and fits(submodel.signature) and not has_pages(compiled):
        name += " with caches in states"  # the plugin has no attention over pages for this processor and these numbers
    return compiled, f"{name} with dynamic 8-bit activations" if device == "CPU" and _rounds(compiled) else name


def _compiled(core: Any, submodel: Submodel, graph: Path, device: str, config: Mapping[str, Any], shapes: Shapes | None = None) -> Any:
    """A decoder's cache is kept in pages where the plugin has an attention for the processor and the numbers asked for, else in states."""

    def read() -> Any:
        model = core.read_model(graph)
        use_zero_points(model, submodel.spans)
        if device == "CPU" and submodel.compute == "float32" and _has_bfloat16(core):
            halve_attention(model, submodel.bfloat16)
        if submodel.signature.states:
            keep_states(model, submodel.signature)
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        return model

    if device == "CPU" and fits(submodel.signature):
        with suppress(RuntimeError):
            model = read()
            use_pages(model)
            return core.compile_model(model, device, config)
    return core.compile_model(read(), device, config)


def _half(core: Any, submodel: Submodel) -> bool:
    """Whether the bundle asks for bfloat16 throughout and the processor has it. States would fall out of their pages."""
    return submodel.compute == "bfloat16" and not submodel.signature.states and _has_bfloat16(core)


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _numbers(dynamic: bool, half: bool = False) -> dict[str, Any]:
    """What the CPU plugin computes in."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP if dynamic else 0),
    }


def _rounds(compiled: Any) -> bool:
    """Whether inputs of layers are rounded to 8 bits: asked for, by a model that has such layers, on a processor that can."""
    return int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) > 0 and _has_quantized_weights(compiled) and _processor_rounds()


def _has_quantized_weights(compiled: Any) -> bool:
    """Whether there are layers with quantized weights and float inputs. The others' primitives are those of int8."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    layers = [node for node in nodes if node["layerType"].astype(str) == "FullyConnected"]
    return any(
        node["runtimePrecision"].astype(str) in ("i4", "i8") and not node["primitiveType"].astype(str).endswith("_i8") for node in layers
    )


@cache
def _processor_rounds() -> bool:
    """Try one product whose result tells: next to 127, an input of 0.25 is lost in 8 bits."""
    ops = require("openvino.opset15", "openvino")
    inputs = ops.parameter([1, 2 * GROUP], np.float32)
    weights = ops.multiply(ops.convert(ops.constant(np.ones((2 * GROUP, 16), np.int8)), "f32"), ops.constant(np.ones((1, 16), np.float32)))
    model = require("openvino", "openvino").Model([ops.matmul(inputs, weights, False, False)], [inputs])
    values = np.full((1, 2 * GROUP), 0.25, np.float32)
    values[:, ::GROUP] = 127
    (result,) = _core().compile_model(model, "CPU", _numbers(True))(values).values()
    return float(result[0, 0]) != float(values.sum())
