"""Storing a graph's weights in half, and what of it may compute in half: measured on captured inputs, node by node
where they overflow.

A lowered graph (`runtime.targets.lowering.half`) is emulated: each node computes in float32 what it is given in half,
and its result is rounded to half, as units do that accumulate in float32. ONNX Runtime's CPU provider would not show
it: between neighbours that it has no half kernels for it leaves the casts out, and so neither rounds nor overflows
where a device does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from calibration.observe.lean import lean_session
from calibration.quantize.layers import is_constant, name_of, tensor_of
from calibration.quantize.weights import release
from runtime.bundle.signature import Array
from runtime.errors import InvalidInput
from runtime.targets.lowering.half import TOLERANCE, Half, rounding, to_half

HEADROOM: Final = 4.0
"""Tensors that came this near to the largest number of half are not stored in it.

Of 1,514 tensors of the samples none was larger in eight calls than in four of them by more than a factor of 3.4.
"""
WORTH: Final = 3.0
"""A kind of node is kept in float32 where that gains so many dB of the outputs: half of the noise."""
LEAST_SNR: Final = 30.0
"""Outputs that half would leave noisier than this, in dB, are better computed in float32: the samples have 28 dB in
int8.
"""
CALLS: Final = 4
"""Captured calls that noise is measured on, evenly spread; ranges are those of all."""

FLOATS: Final = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
ANGLES: Final = {"Sin", "Cos"}
REDUCTIONS: Final = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
POINTWISE: Final = {"Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Max", "Min", "Clip"}
KINDS: Final[Mapping[str, frozenset[str]]] = {
    "normalization": frozenset(
        {"LayerNormalization", "GroupNormalization", "RMSNormalization", "InstanceNormalization"}
    ),
    "softmax": frozenset({"Attention", "Softmax", "LogSoftmax"}),
    "sum": frozenset({"Add"}),
}
"""Operators by what habit keeps in float32."""


@dataclass(frozen=True)
class HalfCompute:
    """The number format that a target with kernels for it computes a submodel in, and the nodes that stay in float32,
    each with the reason.

    `snr_db` is the signal to noise ratio of the outputs against the reference, of the mean noise of all outputs.
    """

    compute: Literal["float32", "float16", "bfloat16"] = "float32"
    keep: Mapping[str, str] = field(default_factory=dict)
    snr_db: float = 200.0
    reason: str = ""

    @classmethod
    def measure(
        cls, graph: Path, half: Half, samples: Sequence[Mapping[str, Array]], reference: ir.Model | None = None
    ) -> HalfCompute:
        """Try a written canonical graph, of whatever recipe, in half.

        `reference` is what its outputs are compared with: the float graph of a quantized one, for where activations are
        quantized the least difference changes codes, and half is as near to float as float32 is; None is the graph
        itself. Raises InvalidInput without samples, or for NaN and infinity.
        """
        model = ir.load(graph)
        if not samples:
            raise InvalidInput(
                "samples", f"are none, expected captured inputs of {graph.parent.name}: calibrate with more requests"
            )
        numbers = ml_dtypes.finfo(ir.DataType[half.upper()].numpy())
        limit = float(numbers.max) / HEADROOM
        keep = dict.fromkeys(
            angles(model), f"an angle of n radians would be wrong by up to n * {float(numbers.eps) / 2:.2g}"
        )
        for name, peak in peaks(model, samples).items():
            if peak > limit:
                keep |= dict.fromkeys(_around(model, name), f"{name} reaches {peak:.3g}")
        trial = _Trial(model, half, samples[:: -(-len(samples) // CALLS)], reference or model)
        best = trial.snr_db(keep)
        for kind, nodes in _kinds(model):
            new = [name for name in nodes if name not in keep]
            reached = trial.snr_db([*keep, *new]) if new else best
            if reached >= best + WORTH:
                keep |= dict.fromkeys(new, f"{kind}: all of them gain {reached - best:.1f} dB")
                best = reached
        least = min(LEAST_SNR, trial.snr_db() - WORTH) if reference else LEAST_SNR
        if not best >= least:
            return cls(reason=f"{half} leaves its outputs {best:.1f} dB, less than {least:.0f}", snr_db=best)
        return cls(half, keep, best)


def store(model: ir.Model, half: Half) -> ir.Model:
    """A copy of a float graph whose weights are stored in half; it computes in float32 as before.

    Vectors and matrices are converted when the copy is written. What half cannot express stays as it is, and what
    angles are computed from: the frequencies of rotary and sinusoidal embeddings.
    """
    copy, dtype = model.clone(), ir.DataType[half.upper()]
    exact = {value for name in angles(copy) for value in copy.graph.node(name).inputs}
    for value in list(copy.graph.initializers.values()):
        tensor = tensor_of(value)
        if value.dtype in FLOATS - {dtype} and tensor.size > 1 and value not in exact and _fits(tensor, dtype):
            _store(copy, value, dtype)
    return copy


def _fits(tensor: ir.TensorProtocol, dtype: ir.DataType) -> bool:
    fits = rounding(tensor.numpy(), dtype.numpy()) <= TOLERANCE
    release(tensor)
    return fits


def _store(model: ir.Model, value: ir.Value, dtype: ir.DataType) -> None:
    """Convert an initializer; its readers get float32 from a Cast, which stands after a lookup in a table."""
    tensor = tensor_of(value)

    def convert() -> ir.TensorProtocol:
        values = tensor.numpy().astype(dtype.numpy())
        release(tensor)
        return ir.tensor(values, dtype=dtype, name=value.name)

    value.const_value = ir.LazyTensor(convert, dtype, ir.Shape(tensor.shape.numpy()), name=value.name)
    value.type = ir.TensorType(dtype)
    readers = [node for node, _ in value.uses() if node.op_type != "Cast"]
    for node in [node for node in readers if node.op_type == "Gather" and node.inputs[0] is value]:
        readers.remove(node)
        found = node.outputs[0]
        if found.dtype == ir.DataType.FLOAT:
            cast = _cast(found, ir.DataType.FLOAT, f"{node.name}/Cast")
            found.name, cast.outputs[0].name = f"{found.name}.stored", found.name
            ir.convenience.replace_all_uses_with(found, cast.outputs[0], replace_graph_outputs=True)
            cast.replace_input_with(0, found)
            model.graph.insert_after(node, cast)
        found.type = ir.TensorType(dtype)
    if readers:
        cast = _cast(value, ir.DataType.FLOAT, f"{value.name}/Cast")
        cast.outputs[0].name = f"{value.name}.float"
        model.graph.insert_before(next(node for node in model.graph if node in readers), cast)
        for node, index in list(value.uses()):
            if node in readers:
                node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": dtype}, name=name)
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    return cast


def emulate(lowered: ir.Model) -> ir.Model:
    """A lowered graph for ONNX Runtime that rounds where a device does: every node between Casts of its own, computing
    in float32.
    """
    copy, halves = lowered.clone(), FLOATS - {ir.DataType.FLOAT}
    for node in [node for node in copy.graph if node.op_type != "Cast"]:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in halves:
                cast = _cast(value, ir.DataType.FLOAT, f"{node.name}/{index}/widened")
                cast.outputs[0].name = f"{value.name}.{node.name}.{index}"
                copy.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in node.outputs:
            if value.dtype in halves:
                cast = _cast(value, value.dtype, f"{value.name}/rounded")
                cast.outputs[0].name = f"{value.name}.rounded"
                value.type = ir.TensorType(ir.DataType.FLOAT)
                ir.convenience.replace_all_uses_with(value, cast.outputs[0], replace_graph_outputs=True)
                cast.replace_input_with(0, value)
                copy.graph.insert_after(node, cast)
    return copy


def peaks(model: ir.Model, samples: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """The largest magnitude of every float32 tensor, by name. Raises InvalidInput where one is no number."""
    measured = model.clone()
    common.ShapeInferencePass()(measured)  # the tracer leaves types out
    made = [value for node in measured.graph for value in node.outputs if value.uses() or value.is_graph_output()]
    values = [value for value in [*measured.graph.inputs, *made] if value.dtype == ir.DataType.FLOAT]
    names = {f"{name_of(value)}/peak": name_of(value) for value in values}
    if not values:
        return {}
    for value, name in zip(values, names, strict=True):
        magnitude = ir.node("Abs", [value], name=f"{name}/Abs")
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0}, name=f"{name}/ReduceMax")
        output, maker = largest.outputs[0], value.producer()
        output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, ir.Shape([])
        if maker is None:
            measured.graph.insert_before(measured.graph[0], [magnitude, largest])
        else:
            measured.graph.insert_after(maker, [magnitude, largest])
        measured.graph.outputs.append(output)
    session: Any = lean_session(measured)
    found = np.max(
        [session.run(list(names), dict(sample)) for sample in samples], axis=0, initial=0
    )  # an empty past has -inf
    wrong = [names[name] for name, peak in zip(names, found, strict=True) if not np.isfinite(peak)]
    if wrong:
        raise InvalidInput("samples", f"make tensor '{wrong[0]}' NaN or infinite in float32: the checkpoint is damaged")
    return {names[name]: float(peak) for name, peak in zip(names, found, strict=True)}


def angles(model: ir.Model) -> list[str]:
    """The nodes that give sines and cosines, and all that their arguments are computed by, in graph order."""
    return _with_sources(model, [node for node in model.graph if node.op_type in ANGLES])


def _with_sources(model: ir.Model, nodes: Iterable[ir.Node]) -> list[str]:
    found, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    return [name_of(node) for node in model.graph if node in found]


def _around(model: ir.Model, tensor: str) -> list[str]:
    """The nodes that make and read a tensor."""
    value = ir.convenience.create_value_mapping(model.graph)[tensor]
    maker = value.producer()
    return [name_of(node) for node in [*([maker] if maker else []), *dict.fromkeys(node for node, _ in value.uses())]]


def _kinds(model: ir.Model) -> Iterator[tuple[str, list[str]]]:
    """Nodes that are kept or not as one, by what they are."""
    yield "statistic", statistics(model)
    for kind, operators in KINDS.items():
        yield kind, [name_of(node) for node in model.graph if node.op_type in operators and not _is_bias(node)]


def _is_bias(node: ir.Node) -> bool:
    """Whether an Add adds a constant, as opposed to two results, such as the residual stream's."""
    return node.op_type == "Add" and any(is_constant(value) for value in node.inputs)


def statistics(model: ir.Model) -> list[str]:
    """The nodes that compute means and variances one by one, from the square to where the statistic is applied, in
    graph order.

    Operators such as LayerNormalization do as much inside, in float32 (`stash_type`).
    """
    found: set[ir.Node] = set()
    for reduction in [node for node in model.graph if node.op_type in REDUCTIONS]:
        source, node = reduction.inputs[0], reduction
        maker = source.producer() if source is not None else None
        if source is not None and maker is not None and maker.op_type in POINTWISE and len(source.uses()) == 1:
            found.add(maker)
        while True:
            found.add(node)
            readers = {user for user, _ in node.outputs[0].uses()}
            if len(readers) != 1 or next(iter(readers)).op_type not in POINTWISE:
                break
            last, node = node, readers.pop()
            if any(value is not last.outputs[0] and not is_constant(value) for value in node.inputs):
                found.add(node)
                break
    return [name_of(node) for node in model.graph if node in found]


class _Trial:
    """A graph in half against its reference, with whichever nodes kept."""

    def __init__(
        self, model: ir.Model, half: Half, samples: Sequence[Mapping[str, Array]], reference: ir.Model
    ) -> None:
        self.model, self.half, self.samples = model, half, samples
        self.reference = self._run(reference)

    def snr_db(self, keep: Iterable[str] | None = None) -> float:
        """Of the outputs' mean relative noise, in float32 without `keep`; -200 where one is NaN or infinite."""
        found = self._run(self.model if keep is None else emulate(to_half(self.model, self.half, set(keep))))
        noises = [_noise(values, wanted) for values, wanted in zip(found, self.reference, strict=True)]
        mean = float(np.mean(noises)) if noises else 0.0
        return -10 * math.log10(max(mean, 1e-20)) if math.isfinite(mean) else -200.0

    def _run(self, model: ir.Model) -> list[list[Array]]:
        """Each output's values, call by call."""
        session: Any = lean_session(model)
        return [
            list(values) for values in zip(*(session.run(None, dict(sample)) for sample in self.samples), strict=True)
        ]


def _noise(values: Sequence[Array], wanted: Sequence[Array]) -> float:
    """Power of the difference as a share of the power wanted."""
    error = sum(
        float(np.square(np.subtract(one, other, dtype=np.float64)).sum())
        for one, other in zip(values, wanted, strict=True)
    )
    return error / (sum(float(np.square(other, dtype=np.float64).sum()) for other in wanted) or 1.0)
