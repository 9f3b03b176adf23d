"""OpenVINO reads the canonical graph directly. KV caches become pages (on the CPU) or states of the model, updated in
place.

Nothing is stored at build time, and on the device only where the user says so (`runtime.targets.openvino.blobs`):
OpenVINO maps the graph and its weights in about a second and compiles for the
processor it finds, so a bundle never carries an engine that does not fit. Compiling at build time proves that the graph
is accepted, and measures it.

Numbers have the precision that the bundle states, not the plugin's default on this processor (bfloat16, a cache of 8
bits, inputs rounded to 8 bits). `Options.settings` may override that: `KV_CACHE_PRECISION` "u8" makes the cache a
quarter as large.

On the CPU, graphs with quantized activations are compiled for each shape they are called with: at dynamic shapes the
plugin of 2026.4 computes int8 convolutions of Stable Diffusion wrongly (3 dB). See
docs/decisions/0011-int8-at-fixed-shapes.md. A denoiser is also compiled for classifier-free guidance batches, whose
rows share their first layers (`runtime.targets.openvino.sharing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle.manifest import Artifact, Submodel, sha256
from runtime.bundle.signature import BATCH, Array, Signature
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot, SlotCall, require_distinct
from runtime.errors import EngineError, MissingDependency
from runtime.files import cache_folder, key_of
from runtime.optional import require
from runtime.placing.choices import Choice, Decision, Subject, decide
from runtime.placing.containers import allowance
from runtime.placing.processor import cores
from runtime.targets.openvino.blobs import kept
from runtime.targets.openvino.devices import Where
from runtime.targets.openvino.graph import (
    BEAMS,
    StoredGraph,
    halve_attention,
    keep_nf4,
    keep_states,
    keep_tables,
    use_zero_points,
    vary_attention,
    widen,
)
from runtime.targets.openvino.pages import PagedCall, Pages, Table, fits, has_pages, use_pages
from runtime.targets.openvino.part import cut, where_to_cut
from runtime.targets.openvino.sharing import guided, has_conditions, share_rows

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each input, by name."""


class Fixed(NamedTuple):
    """The fixed calls that a model is compiled for: shapes of inputs by name, and whether the rows are a
    classifier-free guidance batch.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    guided: bool = False

    @classmethod
    def of(cls, shapes: Shapes, guided: bool = False) -> Fixed:
        return cls(tuple(sorted(shapes.items())), guided)


GROUP: Final = 64
"""Inputs of a layer that share a scale where they are rounded to 8 bits. Layers whose int4 blocks are not a multiple of
it, or whose int8 weights have fewer inputs, are computed in float. See docs/decisions/0009-dynamic-activations.md.
"""


SHAPES_CHOICE: Final = "shapes"
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("bfloat16", "float32"),
    "zero_points": ("on", "off"),
    SHAPES_CHOICE: ("any", "fixed"),
    "activation_group": (str(GROUP), "32", "0"),
    "threads": ("cores", "all"),
}
"""Choices that depend on the processor, the default first (`runtime.placing.choices`). A bundle that allows inputs of 8
bits in groups of 64 also allows smaller groups and none (0): both are nearer to float. There is a thread for each core,
or for each hardware thread.
"""
MARGIN: Final = 0.02
MARGINS: Final = {"zero_points": 0.05, SHAPES_CHOICE: 0.1}
"""Zero points improve the output by 1 dB or more, and each fixed shape takes seconds to compile: giving up either must
pay.
"""
PART: Final = 10**11
"""Multiplications of the part of a submodel that is timed for its choices: about 0.3 s on two cores."""
UNWORTHY: Final = 2 * 10**9
"""Submodels with fewer multiplications in a call take milliseconds: nothing is measured for them."""
ANSWER: Final = 64
"""Steps of one token that a decoder is timed with after one prompt."""


@cache
def _core() -> Any:
    core = require("openvino", "openvino").Core()
    return core


SHAPES: Final = 2
"""Shapes that a submodel is kept compiled for where each needs its own; the least recently used one is dropped first.
"""


class OpenVINO(Engine):
    """A compiled model. Stateless calls use one infer request, or one for each shape. Slots share pages and one
    request, or have one each.
    """

    target = "openvino"
    packages = ("openvino",)
    rank = 20
    precisions = Engine.precisions | {"nf4"}
    choices = CHOICES

    def __init__(
        self,
        submodel: Submodel,
        graph: StoredGraph,
        made: _Made,
        fix: Callable[[Fixed], Any] | None = None,
        every: bool = False,
    ) -> None:
        self.submodel = submodel
        self.device = made.device
        self.fallbacks = made.fallbacks
        self.decisions = made.decisions
        self._compiled = made.compiled
        self._request = made.compiled.create_infer_request()
        self._computes = made.computes
        self._fix, self._every = fix, every
        self._graph = graph  # what is compiled reads from its weights
        self._fixed: dict[Fixed, Any] = {}
        if every:
            self._fixed[_usual(submodel)] = self._request
        self._pages = Pages(made.compiled, submodel.signature.decoder) if has_pages(made.compiled) else None
        self._slots: WeakKeyDictionary[Slot, _Held | Table] = WeakKeyDictionary()

    @classmethod
    def available(cls) -> Availability:
        try:
            sdk, core = require("openvino", "openvino"), _core()
        except MissingDependency as error:
            return Availability(False, reason=str(error))
        names = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
        return Availability(
            bool(names),
            tuple(f"{name} ({full})" for name, full in names.items()),
            "" if names else "no device",
            sdk.__version__,
        )

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        cls.check_settings(options.settings)
        _compile(submodel, StoredGraph(graph), Options())
        return Artifact(target=cls.target, submodel=submodel.name, seconds=time.perf_counter() - start)

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        graph = StoredGraph(root / submodel.graph)
        made = _compile(submodel, graph, options)
        if submodel.signature.states or not _varies(submodel):
            return cls(submodel, graph, made)

        def fix(fixed: Fixed) -> Any:
            options.verify()
            return _compile(submodel, graph, options, fixed, made.decisions).compiled

        return cls(submodel, graph, made, fix, made.fixed)

    @property
    def computes(self) -> str:
        return self._computes

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        if self._pages is not None:
            return self._run_paged([SlotCall(inputs, slot)])[0]
        request, feed = self._request, dict(inputs)
        try:
            shapes = {name: array.shape for name, array in inputs.items()}
            if self._fix is not None and self._compiles(shapes):
                request = self._for(
                    self._fix, Fixed.of(shapes, self._every and guided(self.submodel.signature, inputs))
                )
            elif self.submodel.signature.states:
                batch = len(next(iter(inputs.values())))
                request = self._held(slot or Slot(), batch).request
                feed |= {BEAMS: np.arange(batch, dtype=np.int32)}
            results = request.infer(feed, share_inputs=True)
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None
        return {tensor.name: np.array(results[tensor.name]) for tensor in self.submodel.signature.outputs}

    def joins(self, inputs: Mapping[str, Array]) -> bool:
        return self._fix is None or not self._compiles({name: array.shape for name, array in inputs.items()})

    def _compiles(self, shapes: Shapes) -> bool:
        """Whether calls of these shapes are compiled by themselves."""
        return self._every or _least(self.submodel.signature, shapes)

    def run_many(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        """One infer request for all rows of all calls where the cache is in pages, else one call after another."""
        return super().run_many(calls) if self._pages is None else self._run_paged(calls)

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        if self._pages is None:
            return super().run_last(inputs, slot, count)
        self.require_positions(inputs, count)
        return self._run_paged([SlotCall(inputs, slot, count)])[0]

    def _run_paged(self, calls: Sequence[SlotCall]) -> list[dict[str, Array]]:
        assert self._pages is not None
        require_distinct(calls)
        positions = self.submodel.signature.decoder.positions
        paged = [
            PagedCall(inputs, self._table(slot or Slot(), len(inputs[positions])), last) for inputs, slot, last in calls
        ]
        try:
            return self._pages.run(paged, [tensor.name for tensor in self.submodel.signature.outputs])
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from None

    def copy(self, slot: Slot, to: Slot) -> None:
        held = self._slots.get(slot)
        if isinstance(held, Table):
            assert self._pages is not None
            self._slots[to] = self._pages.copied(held)
        elif held is not None:
            self._slots[to] = held.copied(self._compiled)

    def trim(self, slot: Slot, length: int) -> None:
        super().trim(slot, length)
        held = self._slots.get(slot)
        if not isinstance(held, _Held):
            return
        sdk = require("openvino", "openvino")
        for state in held.request.query_state():
            kept = np.ascontiguousarray(state.state.data[:, :, :length])
            state.state = sdk.Tensor(kept)

    def close(self) -> None:
        self._slots.clear()
        self._fixed.clear()
        self._request = self._compiled = self._pages = None

    def _for(self, fix: Callable[[Fixed], Any], fixed: Fixed) -> Any:
        """The request of the model that is compiled for this; compiled now if there is none."""
        request = self._fixed.pop(fixed, None)
        if request is None:
            while len(self._fixed) >= SHAPES:
                del self._fixed[next(iter(self._fixed))]
            if self._every:
                self._request = self._compiled = None  # the usual shape's is held by the table alone
            request = fix(fixed).create_infer_request()
        self._fixed[fixed] = request
        return request

    def _table(self, slot: Slot, batch: int) -> Table:
        assert self._pages is not None
        held = self._slots.get(slot)
        if not isinstance(held, Table):
            self._slots[slot] = held = self._pages.table(batch)
        self._require_rows(held.batch, batch)
        return held

    def _held(self, slot: Slot, batch: int) -> _Held:
        held = self._slots.get(slot)
        if not isinstance(held, _Held):
            self._slots[slot] = held = _Held(self._compiled.create_infer_request(), batch)
        self._require_rows(held.batch, batch)
        return held

    def _require_rows(self, held: int, batch: int) -> None:
        """Raise EngineError for a call with other rows than its slot: the plugin would read beyond the slot's
        states.
        """
        if held != batch:
            raise self._failed(f"the slot holds {held} rows, this call has {batch}")

    def _failed(self, reason: object) -> EngineError:
        return EngineError(f"OpenVINO could not run {self.submodel.name}: {reason}")


class _Held(NamedTuple):
    """The states of a slot without pages: an infer request, and the number of its rows."""

    request: Any
    batch: int

    def copied(self, compiled: Any) -> _Held:
        sdk, request = require("openvino", "openvino"), compiled.create_infer_request()
        held = {state.name: state.state.data for state in self.request.query_state()}
        for state in request.query_state():
            state.state = sdk.Tensor(np.array(held[state.name]))
        return _Held(request, self.batch)


class _Made(NamedTuple):
    """A compiled model, its device for display, the type it computes in, what runs elsewhere, the decisions for this
    processor, and whether it is compiled for fixed shapes.
    """

    compiled: Any
    device: str
    computes: str
    fallbacks: tuple[str, ...]
    decisions: Mapping[str, Decision]
    fixed: bool


def _where(options: Options) -> Where:
    return Where.of(_core(), options.device)


def _varies(submodel: Submodel) -> bool:
    return any(not isinstance(dim, int) for tensor in submodel.signature.inputs for dim in tensor.dims)


def _needs_shape(submodel: Submodel, where: Where) -> bool:
    """Whether each shape is compiled by itself: on an NPU, and on the CPU where activations are quantized."""
    wrong = where.cpu and submodel.precision.activations != "float"
    return (wrong or where.npu) and not submodel.signature.states and _varies(submodel)


def _least(signature: Signature, shapes: Shapes) -> bool:
    """Whether a varying length other than the batch has its least value: such calls get a model of their own.

    At dynamic shapes, the CPU plugin of 2026.4 computes all later calls of other shapes wrongly (-2 dB) once the sample
    UNet had 2x2 latents, whose smallest feature map is one value, or one token of text.
    """
    return any(
        not isinstance(dim, int)
        and dim.name != BATCH.name
        and dim.min < dim.max
        and shapes[tensor.name][axis] == dim.min
        for tensor in signature.inputs
        for axis, dim in enumerate(tensor.dims)
    )


def _usual(submodel: Submodel) -> Fixed:
    """The most frequent call: a classifier-free guidance batch where there are conditions."""
    signature = submodel.signature
    lengths = {name: dim.opt for name, dim in signature.dims.items()}
    return Fixed.of({tensor.name: tensor.shape(lengths) for tensor in signature.inputs}, has_conditions(signature))


def _compile(
    submodel: Submodel,
    graph: StoredGraph,
    options: Options,
    fixed: Fixed | None = None,
    decisions: Mapping[str, Decision] | None = None,
) -> _Made:
    """Compile for the device: for these calls, or for the usual ones where it needs fixed shapes. Choices that are
    still open are decided now.
    """
    core, where = _core(), _where(options)
    if decisions is None:
        decisions = _decide(core, submodel, graph, where, options)
    values = {name: decision.value for name, decision in decisions.items()}
    if fixed is None and (_needs_shape(submodel, where) or values.get(SHAPES_CHOICE) == "fixed"):
        fixed = _usual(submodel)
    try:
        with kept(where.cpu) as blobs:
            config = blobs | _config(core, submodel, where, options, values)
            model, compiled = _compiled(core, submodel, graph, where, config, values, fixed)
        name, fallbacks = f"openvino:{where.described(core, compiled)}", where.fallbacks(core, model)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"OpenVINO could not compile {graph.path}: {error}") from None
    half = where.cpu and _half(core, submodel)
    if half:
        name += " in bfloat16"
    elif values.get("attention") == "bfloat16":
        name += " with attention in bfloat16"
    if where.plain and fits(submodel.signature) and not has_pages(compiled):
        name += " with caches in states"  # the plugin has no attention over pages for this processor and these numbers
    if where.plain and _rounds(compiled):
        name += " with dynamic 8-bit activations"
    return _Made(compiled, name, "bfloat16" if half else "float32", fallbacks, decisions, fixed is not None)


def _config(core: Any, submodel: Submodel, where: Where, options: Options, values: Mapping[str, str]) -> dict[str, Any]:
    """The plugin's settings. Those of the caller take precedence."""
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if where.cpu:
        group = int(values.get("activation_group", GROUP if submodel.dynamic and where.plain else 0))
        config |= _numbers(group, _half(core, submodel))
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = options.threads
        elif values.get("threads") == "all":
            config |= {"INFERENCE_NUM_THREADS": allowance().threads, "ENABLE_HYPER_THREADING": True}
    else:
        config["CACHE_DIR"] = str(cache_folder() / "openvino")  # their compilers take minutes
    return config | {name: value for name, value in options.settings.items() if name not in CHOICES}


def _read(
    core: Any, submodel: Submodel, graph: StoredGraph, where: Where, values: Mapping[str, str], fixed: Fixed | None
) -> Any:
    """The graph in the form that is compiled, without its states."""
    model = core.read_model(graph.path)
    if submodel.precision.nested:
        widen(model, graph)
    keep_nf4(model, graph)
    if where.cpu:
        keep_tables(model)
    if values.get("zero_points") != "off":
        use_zero_points(model, submodel.activation_ranges)
    if values.get("attention") == "bfloat16":
        halve_attention(model, submodel.bfloat16)
    if fixed is not None:
        model.reshape({name: list(shape) for name, shape in fixed.shapes})
        vary_attention(model)
        if fixed.guided:
            share_rows(model, submodel.signature)
    return model


def _compiled(
    core: Any,
    submodel: Submodel,
    graph: StoredGraph,
    where: Where,
    config: Mapping[str, Any],
    values: Mapping[str, str],
    fixed: Fixed | None = None,
) -> tuple[Any, Any]:
    """The model that was read, and compiled.

    A decoder's cache is kept in pages where the plugin has an attention for the processor and the requested precision,
    else in states.
    """

    def read() -> Any:
        model = _read(core, submodel, graph, where, values, fixed)
        if submodel.signature.states:
            keep_states(model, submodel.signature)
        return model

    if where.plain and fits(submodel.signature):
        with suppress(RuntimeError):
            model = read()
            use_pages(model, submodel.signature)
            return model, core.compile_model(model, where.name, config)
    model = read()
    return model, core.compile_model(model, where.name, config)


def _decide(core: Any, submodel: Submodel, graph: StoredGraph, where: Where, options: Options) -> dict[str, Decision]:
    """The decisions on this submodel's choices for this device and processor."""
    choices = [
        Choice(name, values, MARGINS.get(name, MARGIN))
        for name, values in _possible(core, submodel, where, options).items()
    ]
    if not choices:
        return {}
    described = submodel.model_dump(mode="json", exclude={"name", "parity"})
    key = key_of(described, sha256(graph.path), options.threads, dict(options.settings))
    subject = Subject(submodel.name, OpenVINO.target, str(require("openvino", "openvino").__version__), key)
    own = {name: value for name, value in options.settings.items() if name in CHOICES}
    return decide(choices, subject, _Parts(core, submodel, graph, where, options), own)


def _possible(core: Any, submodel: Submodel, where: Where, options: Options) -> dict[str, tuple[str, ...]]:
    """The values of each choice that the submodel, the processor and the settings leave open."""
    if not where.plain or _half(core, submodel):
        return {}
    open_ones = {
        "attention": bool(submodel.bfloat16) and submodel.precision.compute == "float32" and _has_bfloat16(core),
        "zero_points": bool(submodel.activation_ranges),
        SHAPES_CHOICE: _varies(submodel) and not submodel.signature.states and not _needs_shape(submodel, where),
        "activation_group": submodel.dynamic
        and "DYNAMIC_QUANTIZATION_GROUP_SIZE" not in options.settings
        and _processor_rounds(),
        "threads": not options.threads
        and "INFERENCE_NUM_THREADS" not in options.settings
        and 0 < cores() < allowance().threads,
    }
    return {name: CHOICES[name] for name, is_open in open_ones.items() if is_open}


class _Parts:
    """Compiles the first layers of a submodel with different choices, to time them."""

    def __init__(self, core: Any, submodel: Submodel, graph: StoredGraph, where: Where, options: Options) -> None:
        self.core, self.submodel, self.graph, self.where, self.options = core, submodel, graph, where, options
        self.end: str | None = None

    def __call__(self, values: Mapping[str, str]) -> Callable[[], object]:
        """A function that runs the part once, for the calls of a denoising step or of an answer. Raises EngineError."""
        signature, calls = self.submodel.signature, _calls(self.submodel.signature)
        try:
            if self.end is None:
                self.end, total = where_to_cut(
                    self.core.read_model(self.graph.path), _shapes(signature, calls[0][0]), PART
                )
                if total < UNWORTHY:
                    raise EngineError("it has too little work to be worth it")
            needs_shape = _needs_shape(self.submodel, self.where) or values.get(SHAPES_CHOICE) == "fixed"
            fixed = _usual(self.submodel) if needs_shape else None
            model = cut(_read(self.core, self.submodel, self.graph, self.where, values, fixed), self.end)
            config = _config(self.core, self.submodel, self.where, self.options, values)
            request = self.core.compile_model(model, self.where.name, config).create_infer_request()
            names = [port.any_name for port in model.inputs]
            feeds = [({name: signature.sample(lengths)[name] for name in names}, times) for lengths, times in calls]
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"OpenVINO could not compile a part of {self.submodel.name}: {error}") from None

        def run() -> None:
            for feed, times in feeds:
                for _ in range(times):
                    request.infer(feed, share_inputs=True)

        return run


def _calls(signature: Signature) -> list[tuple[dict[str, int], int]]:
    """Lengths of typical calls with the number of such calls; the first has most work.

    A decoder reads a prompt of half its context and at most 512 tokens, then writes an answer.
    """
    usual = {name: dim.opt for name, dim in signature.dims.items()}
    if signature.port is None:
        return [(usual, 1)]
    prompt = min(512, max(1, signature.longest // 2))
    first, step = signature.port.lengths(0, prompt), signature.port.lengths(prompt, 1)
    return [(usual | first, 1), (usual | step, ANSWER)]


def _shapes(signature: Signature, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape(lengths) for tensor in signature.graph_inputs}


def _half(core: Any, submodel: Submodel) -> bool:
    """Whether the bundle computes in bfloat16 throughout and the processor has it. Decoders do not: their states could
    not be kept in pages.
    """
    return submodel.precision.compute == "bfloat16" and not submodel.signature.states and _has_bfloat16(core)


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _numbers(group: int, half: bool = False) -> dict[str, Any]:
    """Precision settings of the CPU plugin. Inputs of quantized layers are rounded in groups of this size, 0 for not at
    all.
    """
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
    }


def _rounds(compiled: Any) -> bool:
    """Whether inputs of layers are rounded to 8 bits: allowed, in a model with such layers, on a processor that can."""
    return (
        int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) > 0
        and _has_quantized_weights(compiled)
        and _processor_rounds()
    )


def _has_quantized_weights(compiled: Any) -> bool:
    """Whether there are layers with quantized weights and float inputs. Other layers have int8 primitives."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    layers = [node for node in nodes if node["layerType"].astype(str) == "FullyConnected"]
    return any(
        node["runtimePrecision"].astype(str) in ("i4", "i8") and not node["primitiveType"].astype(str).endswith("_i8")
        for node in layers
    )


@cache
def _processor_rounds() -> bool:
    """Try a product whose result shows it: beside 127, an input of 0.25 is lost in 8 bits."""
    ops = require("openvino.opset15", "openvino")
    inputs = ops.parameter([1, 2 * GROUP], np.float32)
    weights = ops.multiply(
        ops.convert(ops.constant(np.ones((2 * GROUP, 16), np.int8)), "f32"), ops.constant(np.ones((1, 16), np.float32))
    )
    model = require("openvino", "openvino").Model([ops.matmul(inputs, weights, False, False)], [inputs])
    values = np.full((1, 2 * GROUP), 0.25, np.float32)
    values[:, ::GROUP] = 127
    (result,) = _core().compile_model(model, "CPU", _numbers(GROUP))(values).values()
    return float(result[0, 0]) != float(values.sum())
