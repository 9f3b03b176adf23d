"""ONNX Runtime on the CPU. KV caches are buffers that past and present of GroupQueryAttention share; they grow by
doubling.

Compiling writes small graphs without weights, which are read from the canonical file. A decoder gets one with caches in
place. A stateless submodel with attention gets one with the attention of `_fused`, and one with quantized activations
another with integer products, and two parts for timing, with and without them:

engines/onnxruntime/<submodel>.onnx            a decoder's; or loaded where products in integers are exact and faster
engines/onnxruntime/<submodel>.fused.onnx      loaded otherwise; without it the canonical graph is
engines/onnxruntime/<submodel>.integers.onnx   the first layers with products in integers
engines/onnxruntime/<submodel>.floats.onnx     those without
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.bundle.manifest import Artifact, Submodel, sha256
from runtime.bundle.signature import BATCH
from runtime.engine import Availability, CompileOptions, Engine, Options
from runtime.errors import EngineUnavailable, MissingDependency
from runtime.files import key_of, written
from runtime.optional import require
from runtime.placing.choices import Choice, Decision, Subject, Values, decide
from runtime.targets.lowering.attention import CONTRIB, with_grouped_cache, with_multihead
from runtime.targets.lowering.logits import with_logits_start
from runtime.targets.lowering.nested import WEIGHTS, widen, widened
from runtime.targets.onnxruntime.integers import cut_behind, first_behind, with_integer_products
from runtime.targets.sessions.base import SessionEngine, folder_of
from runtime.targets.sessions.sessions import ACCURACY, CPU, Device, nested_values, open_session, sdk
from runtime.targets.sessions.stored import SessionPlan, load_graph, read_plan, without_weights

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER: Final = CPU
TRIAL: Final = {"session.disable_prepacking": "1", "session.use_device_allocator_for_initializers": "1"}
"""Settings for a trial load: the graph is checked without copying its weights, together with the level below and
without constant folding.
"""


CHOICES: Final[Mapping[str, tuple[str, ...]]] = {"products": ("integers", "floats")}
"""Choices that depend on the processor (`runtime.placing.choices`): how 8-bit inputs are multiplied with 8-bit weights,
where ONNX Runtime by itself restores both to float32. "floats" loads the canonical graph.
"""
PART: Final = 12
"""Products of the part of a submodel that is timed."""
DEPTH: Final = 64


class ONNXRuntime(SessionEngine):
    """A session on the CPU provider."""

    target = "onnxruntime"
    packages = ("onnxruntime", "onnx", "onnx-ir")
    rank = 30
    choices = CHOICES

    @classmethod
    def available(cls) -> Availability:
        try:
            return Availability(True, (PROVIDER,), version=sdk().__version__)
        except MissingDependency as error:
            return Availability(False, reason=str(error))

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        cls.check_settings(options.settings)
        stored = _lowered(submodel, graph)
        files = [file for name, model in stored.items() for file in _write(output, name, model)]
        tried = next((name for name in (submodel.name, _fused_name(submodel)) if name in stored), None)
        lowered = graph if tried is None else output / f"{tried}.onnx"
        made = _made(submodel, output, tried, graph) if tried == submodel.name else {}
        level, skipped = "ORT_ENABLE_EXTENDED", ["ConstantFolding"]
        open_session(
            lowered, graph.parent, Device(PROVIDER), entries=TRIAL, level=level, skipped=skipped, converted=made
        )
        return Artifact(
            target=cls.target, submodel=submodel.name, files=tuple(files), seconds=time.perf_counter() - start
        )

    @classmethod
    def decide(cls, submodel: Submodel, root: Path, options: Options) -> None:
        folder = folder_of(root, cls.target, options.compiled)
        _decide(submodel, root / submodel.graph, folder, options, _entries(submodel, options))

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        if options.device not in ("", PROVIDER, "CPU"):
            raise EngineUnavailable(f"ONNX Runtime has no device '{options.device}' here: expected {PROVIDER}")
        canonical, folder = root / submodel.graph, folder_of(root, cls.target, options.compiled)
        states = bool(submodel.signature.states)
        entries = _entries(submodel, options)
        device = Device(PROVIDER)
        decisions = _decide(submodel, canonical, folder, options, entries)
        lowered = states or ("products" in decisions and decisions["products"].value == "integers")
        fused = folder / f"{_fused_name(submodel)}.onnx"
        graph = folder / f"{submodel.name}.onnx" if lowered else fused if fused.is_file() else canonical
        made = _made(submodel, folder, submodel.name, canonical) if lowered else {}

        def opened(shape: Any, step: bool) -> Any:
            options.verify()
            return open_session(
                graph, canonical.parent, device, threads=options.threads, entries=entries, converted=made
            )

        rounds = submodel.dynamic and entries[ACCURACY] == "4" and _processor_rounds()
        name = f"onnxruntime:{PROVIDER}" + (" with dynamic 8-bit activations" if rounds else "")
        engine = cls(
            submodel, name, device, SessionPlan(graph=graph.name, cache="grouped" if states else ""), opened, vary=True
        )
        engine.decisions = decisions
        return engine


def _entries(submodel: Submodel, options: Options) -> dict[str, str]:
    """The entries of a session's configuration."""
    settings = {name: value for name, value in options.settings.items() if name not in CHOICES}
    return {ACCURACY: "4" if submodel.dynamic else "0"} | settings


def _fused_name(submodel: Submodel) -> str:
    """The name of the graph with the attention of `_fused`, where there is one."""
    return f"{submodel.name}.fused"


def _fused(model: ir.Model) -> int:
    """Let attention without a mask compute block by block (Dao et al. 2022, arXiv 2205.14135), as the CPU provider's
    MultiHeadAttention does and its Attention does not: that holds every product of a query and a key, 1 GB in a guided
    call of Stable Diffusion at 512x512. Returns how many attentions there are.
    """
    found = with_multihead(model, masked=False)
    if found:
        require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)
    return found


def _lowered(submodel: Submodel, graph: Path) -> dict[str, ir.Model]:
    """The graphs that are stored, by name; none where the canonical one is loaded."""
    name = submodel.name
    if submodel.signature.states:
        model = load_graph(graph)
        with_grouped_cache(model, submodel.signature)
        with_logits_start(model, submodel.signature)
        return {name: model}
    floats = load_graph(graph)
    fused = {_fused_name(submodel): floats} if _fused(floats) else {}
    if submodel.precision.activations == "float":
        return fused
    whole, part, plain = (load_graph(graph) for _ in range(3))
    for model in (whole, part):
        widen(model)
    products, _ = (with_integer_products(model, submodel.activation_ranges) for model in (whole, part))
    if not products:
        return fused
    end = first_behind(plain, products, PART)
    for model in (part, plain):
        cut_behind(model, end)
    _fused(whole)
    return {**fused, name: whole, f"{name}.integers": part, f"{name}.floats": plain}


def _write(output: Path, name: str, model: ir.Model) -> list[str]:
    """Store a graph without weights, with a plan where weights are made when it is loaded. Returns the files' names."""
    output.mkdir(parents=True, exist_ok=True)
    plan = SessionPlan(graph=f"{name}.onnx", nested=widened(model))
    with written(output / plan.graph) as file:
        file.write(without_weights(model, WEIGHTS).SerializeToString())
    if not plan.nested:
        return [plan.graph]
    with written(output / f"{name}.json") as file:
        file.write(plan.model_dump_json(indent=1).encode())
    return [plan.graph, f"{name}.json"]


def _made(submodel: Submodel, folder: Path, name: str, canonical: Path) -> dict[str, Any]:
    """The weights of a stored graph that are computed from the bundle's."""
    return nested_values(read_plan(folder, name), canonical.parent / WEIGHTS) if submodel.precision.nested else {}


def _decide(
    submodel: Submodel, canonical: Path, folder: Path, options: Options, entries: Mapping[str, str]
) -> dict[str, Decision]:
    """The decisions on this submodel's choices for this processor."""
    parts = {value: folder / f"{submodel.name}.{value}.onnx" for value in CHOICES["products"]}
    if submodel.signature.states or not all(part.is_file() for part in parts.values()):
        return {}
    # One row: two sessions are in memory together, and the first layers of a VAE at 512x512 take 1.5 GB a row each.
    lengths = {name: dim.min if name == BATCH.name else dim.opt for name, dim in submodel.signature.dims.items()}
    sample = submodel.signature.sample(lengths)

    def prepare(values: Values) -> Callable[[], object]:
        value = values["products"]
        made = _made(submodel, folder, f"{submodel.name}.{value}", canonical) if value == "integers" else {}
        device = Device(PROVIDER)
        session = open_session(
            parts[value], canonical.parent, device, threads=options.threads, entries=entries, converted=made
        )
        inputs = {value.name: sample[value.name] for value in session.get_inputs()}
        return lambda: session.run(None, inputs)

    choice = Choice("products", CHOICES["products"] if _exact_in_integers() else ("floats",))
    key = key_of(
        submodel.model_dump(mode="json", exclude={"name", "parity"}),
        sha256(parts["integers"]),
        options.threads,
        dict(entries),
    )
    own = {name: value for name, value in options.settings.items() if name in CHOICES}
    return decide([choice], Subject(submodel.name, ONNXRuntime.target, str(sdk().__version__), key), prepare, own)


@cache
def _exact_in_integers() -> bool:
    """Try a product that is wrong where sums of two products are kept in 16 bits, as on x86 without VNNI."""
    session = sdk().InferenceSession(_product_of_integers(), providers=[PROVIDER])
    return float(session.run(None, {"x": np.full((1, DEPTH), 255, np.uint8)})[0][0, 0]) == 255 * 127 * DEPTH


def _product_of_integers() -> bytes:
    """The ONNX model y [1, 1] = MatMulIntegerToFloat(x [1, DEPTH] uint8, 127 everywhere, scales 1)."""
    node = (
        b"".join(_field(1, name) for name in ("x", "codes", "one", "one"))
        + _field(2, "y")
        + _field(4, "MatMulIntegerToFloat")
    )
    graph = _field(1, node + _field(7, CONTRIB)) + _field(2, "product")
    graph += _field(5, _initializer("codes", 3, (DEPTH, 1), bytes([127] * DEPTH)))
    graph += _field(5, _initializer("one", 1, (), np.ones(1, "<f4").tobytes()))
    return _model(graph, _tensor_type(2, DEPTH))


@cache
def _processor_rounds() -> bool:
    """Try a product of 4 and of 8 bits whose result shows it: beside 127, an input of 0.25 is lost in 8 bits."""
    values = np.array([[127] + [0.25] * 31], np.float32)
    sessions = [sdk().InferenceSession(_product_of_ones(bits), providers=[PROVIDER]) for bits in (4, 8)]
    return all(float(session.run(None, {"x": values})[0][0, 0]) != float(values.sum()) for session in sessions)


def _product_of_ones(bits: int) -> bytes:
    """The ONNX model y [1, 1] = MatMulNBits(x [1, 32]) with weights of 1, written field by field (numbers: onnx.proto
    of ONNX 1.23).

    Serving machines have no library that writes ONNX.
    """

    numbers = {"K": 32, "N": 1, "bits": bits, "block_size": 32, "accuracy_level": 4}
    codes = bytes([0x99] * 16 if bits == 4 else [129] * 32)  # the zero point is in the middle: 8 and 128
    node = (
        b"".join(_field(1, name) for name in ("x", "codes", "scales"))
        + _field(2, "y")
        + _field(4, "MatMulNBits")
        + _field(7, CONTRIB)
    )
    node += b"".join(_field(5, _field(1, name) + _field(3, number) + _field(20, 2)) for name, number in numbers.items())
    graph = _field(1, node) + _field(2, "product")
    graph += _field(5, _initializer("codes", 2, (1, 1, len(codes)), codes))
    graph += _field(5, _initializer("scales", 1, (1, 1), np.ones(1, "<f4").tobytes()))
    return _model(graph, _tensor_type(1, 32))


def _model(graph: bytes, taken: bytes) -> bytes:
    """A model of a graph with input x of that type and output y [1, 1], with opset 21 and ONNX Runtime's own
    operators.
    """
    graph += _field(11, _field(1, "x") + _field(2, taken)) + _field(12, _field(1, "y") + _field(2, _tensor_type(1, 1)))
    opsets = _field(8, _field(1, "") + _field(2, 21)) + _field(8, _field(1, CONTRIB) + _field(2, 1))
    return _field(1, 10) + _field(7, graph) + opsets


def _tensor_type(dtype: int, length: int) -> bytes:
    """The type of a tensor [1, length]."""
    shape = b"".join(_field(1, _field(1, dim)) for dim in (1, length))
    return _field(1, _field(1, dtype) + _field(2, shape))


def _initializer(name: str, dtype: int, dims: tuple[int, ...], data: bytes) -> bytes:
    return b"".join(_field(1, dim) for dim in dims) + _field(2, dtype) + _field(8, name) + _field(9, data)


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protocol buffer message: its number and an integer, or a text, bytes or message with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)
