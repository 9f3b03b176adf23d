"""Graphs of the samples as recipes make them, targets compiled from them and run on this machine, and small graphs of
one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Compiled, CompileOptions, Engine, Options, target
from runtime.targets.sessions.base import SessionEngine
from runtime.targets.sessions.sessions import ACCURACY, CPU, Device, open_session
from runtime.targets.sessions.stored import SessionPlan

Make = Callable[..., Engine]
FLOOR = {"float32": 100.0, "float16": 40.0}
"""dB beside the canonical graph, by what a target computes in."""
COUNTS = (33, 1, 1, 5, 40, 1)
"""New positions of the calls of one decoder: a prompt, steps, and further turns."""


def snr_db(values: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal to noise ratio in dB of values beside what they should be."""
    assert values.shape == reference.shape and values.dtype == reference.dtype
    exact = reference.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / max(np.sum((values - exact) ** 2), 1e-30)))


def quantized(bundle: Bundle, submodel: Submodel, recipe: str) -> Path:
    """A folder with the submodel's graph as the recipe makes it, with ranges wide enough for anything, where a bundle
    would have it. It is made once in a run: no test changes it.
    """
    from filelock import FileLock

    from calibration.observe.ranges import Range
    from calibration.quantize.plan import activation_tensors, plan
    from calibration.quantize.qdq import quantize
    from calibration.quantize.recipes import RECIPES
    from export.graph.weights import write

    if recipe == "none":
        return bundle.root
    root = bundle.root.parent / "quantized" / f"{bundle.root.name}-{recipe}"
    place = (root / submodel.graph).parent
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            model, chosen = ir.load(bundle.root / submodel.graph), RECIPES[recipe]
            ranges = {name: Range(peak=8.0, snr_db=60.0) for name in activation_tensors(model, chosen)}
            unfinished = place.with_name(f"{place.name}.unfinished")
            write(quantize(model, plan(model, chosen, ranges), ranges), unfinished)
            unfinished.rename(place)
    return root


@pytest.fixture
def emulated(tmp_path: Path) -> Make:
    """Compile a submodel for a target from the given graph and load what came out on the CPU."""

    def make(name: str, submodel: Submodel, graph: Path, settings: Mapping[str, str] | None = None) -> Engine:
        root = tmp_path / name
        made = compiled(name, submodel, graph, root, settings)
        return target(name).emulate(submodel, root, Options(threads=1, compiled=made))

    return make


def compiled(
    name: str, submodel: Submodel, graph: Path, root: Path, settings: Mapping[str, str] | None = None
) -> Compiled:
    """What a target makes of a graph, in a folder that stands for a bundle."""
    place = root / submodel.graph
    if not place.exists():
        place.parent.parent.mkdir(parents=True, exist_ok=True)
        place.parent.symlink_to(graph.parent)
    folder = root / "engines" / name
    return Compiled(target(name).compile_with(CompileOptions(settings or {}), submodel, graph, folder), folder)


def canonical(submodel: Submodel, graph: Path) -> Any:
    """A session of the canonical graph, as it is: ONNX Runtime fuses nothing that rounds."""
    return open_session(graph, graph.parent, Device(CPU), threads=1, entries={ACCURACY: "0"}, level="ORT_ENABLE_BASIC")


class Reference:
    """A canonical decoder run step by step with its whole past."""

    def __init__(self, submodel: Submodel, graph: Path, batch: int = 1) -> None:
        self.session, self.signature = canonical(submodel, graph), submodel.signature
        self.past: dict[str, Array] = {
            state.past.name: np.zeros(state.past.shape({"batch": batch, "past": 0}), np.float32)
            for state in self.signature.states
        }

    def run(self, inputs: Mapping[str, Array]) -> Array:
        names = [tensor.name for tensor in self.signature.graph_outputs]
        found = dict(zip(names, self.session.run(names, {**inputs, **self.past}), strict=True))
        self.past = {state.past.name: found[state.present.name] for state in self.signature.states}
        logits: Array = found["logits"]
        return logits


def tokens(submodel: Submodel, batch: int, counts: Sequence[int], seed: int = 0) -> list[dict[str, Array]]:
    """The inputs of calls with so many new positions each."""
    rng, done = np.random.default_rng(seed), 0
    width = int(str(submodel.signature.inputs[0].dims[-1]))
    calls = []
    for count in counts:
        done += count
        calls.append(
            {
                "inputs_embeds": (0.3 * rng.standard_normal((batch, count, width))).astype(np.float32),
                "attention_mask": np.ones((batch, done), np.int64),
                "position_ids": np.tile(np.arange(done - count, done), (batch, 1)),
            }
        )
    return calls


def toy(
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    constants: Mapping[str, NDArray[Any]] | None = None,
    opset: int = 23,
) -> ir.Model:
    """A graph of a few nodes, from its inputs to what the last node gives first."""
    graph = ir.Graph(list(inputs), [nodes[-1].outputs[0]], nodes=list(nodes), opset_imports={"": opset}, name="toy")
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.name in (constants or {}):
                tensor = ir.tensor((constants or {})[str(value.name)], name=value.name)
                value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
                graph.register_initializer(value)
    return ir.Model(graph, ir_version=10)


def value(name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def run(model: ir.Model, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What the graph's first output is, according to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, dict(feed))[0])


def plain(submodel: Submodel, graph: Path, **settings: Any) -> SessionEngine:
    """An engine over a canonical graph without states, on the CPU."""

    class Plain(SessionEngine):
        target, rank = "plain", 99
        available = compile = load = None  # type: ignore[assignment]

    Plain.__abstractmethods__ = frozenset()
    shapes = settings.pop("shapes", ())
    opened: list[Any] = settings.pop("opened", [])
    device = settings.pop("device", Device(CPU))

    def open_one(shape: Mapping[str, int], step: bool) -> Any:
        opened.append(dict(shape))
        return open_session(
            graph,
            graph.parent,
            Device(CPU),
            threads=1,
            entries={"session.record_ep_graph_assignment_info": "1"},
            fixed=shape,
        )

    return Plain(submodel, "plain", device, SessionPlan(graph=graph.name, shapes=shapes), open_one, **settings)
