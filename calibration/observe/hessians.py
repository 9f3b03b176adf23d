"""Second moments of what layers read, H = X^T X summed over the rows of every call: what one channel's error costs
where others can help.

A matrix has as many rows and columns as its tensor has channels, so only some are gathered at a time: the graph is run
in stretches, each of which starts from what the one before left, on calls kept in memory, unless that is too much: then
from the graph's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir

from calibration.ground.progress import each, phase
from calibration.observe.lean import lean_session, rows_of
from calibration.quantize.layers import name_of
from calibration.quantize.weights import Floats
from runtime.bundle.signature import Array
from runtime.errors import InvalidInput

GATHERED_BYTES: Final = 512 << 20
"""Matrices gathered in one stretch, those of the running call included; one that is larger is gathered alone."""
KEPT_BYTES: Final = 512 << 20
"""What all calls together may leave between two stretches."""
SUFFIX: Final = "/gram"

Calls = list[dict[str, Array]]


class Hessian(NamedTuple):
    """X^T X, float32 [K, K], of `rows` rows of K channels."""

    matrix: Floats
    rows: int

    def divided(self, scales: Floats) -> Hessian:
        """That of the same tensor with each channel divided by its scale (positive, [K])."""
        return Hessian(self.matrix / scales / scales[:, None], self.rows)


def hessians(
    model: ir.Model, tensors: Sequence[str], samples: Sequence[Mapping[str, Array]]
) -> Iterator[tuple[str, Hessian]]:
    """The Hessian of each named tensor [..., K] of a float graph over captured inputs, in graph order: ask for one
    after another.

    Of a tensor of one row a call that a Slice cuts from another, all rows of that other are counted: a decoder computes
    the logits of a call's last position only, but any position may be the last. Raises InvalidInput when there are no
    samples, the graph has no such tensor, or one held NaN, infinity or magnitudes whose squares exceed float32.
    """
    if not tensors:
        return
    if not samples:
        raise InvalidInput(
            "samples",
            f"are none, expected at least one captured input for {model.graph.name}: calibrate with more requests",
        )
    values = ir.convenience.create_value_mapping(model.graph)
    missing = [name for name in tensors if name not in values]
    if missing:
        raise InvalidInput(
            "tensors",
            f"{model.graph.name} has no tensor {', '.join(missing[:3])}: the requested ones are of another graph",
        )
    flow = _Flow.of(model)
    sources = {name: _unsliced(values[name]) for name in dict.fromkeys(tensors)}
    wanted = sorted(dict.fromkeys(sources.values()), key=flow.place)
    whole = lean_session(model)
    calls: Calls = [row for sample in samples for row in rows_of(sample, whole)]
    del whole
    groups = _groups(wanted)
    for number, group in enumerate(each("stretch", groups)):
        later = [value for others in groups[number + 1 :] for value in others]
        crossing = flow.crossing(later, group[-1])
        with phase(0.0, 0.5):
            found, calls = _gather(model, group, crossing, calls)
        with phase(0.5, 1.0):
            for value in each("tensor", group):
                hessian = found.pop(name_of(value))
                for name, source in sources.items():
                    if source is value:
                        yield name, hessian


def _unsliced(value: ir.Value) -> ir.Value:
    """What a value of one row a call is cut from, as long as channels, of a fixed number, stay as they are."""
    if value.shape is None or len(value.shape) < 2 or value.shape[-2] != 1:
        return value
    while (node := value.producer()) is not None and node.op_type == "Slice" and (source := node.inputs[0]) is not None:
        if _width(source) is None or _width(source) != _width(value):
            break
        value = source
    return value


def _width(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _groups(wanted: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """Values in order, as many together as may be gathered at once."""
    groups: list[list[ir.Value]] = [[]]
    held = 0
    for value in wanted:
        width = _width(value)
        if width is None:
            raise InvalidInput(
                "tensors", f"'{value.name}' has no fixed number of channels: no weight is multiplied by it"
            )
        size = 2 * 4 * width**2
        if groups[-1] and held + size > GATHERED_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(value)
        held += size
    return groups


@dataclass(frozen=True)
class _Flow:
    """The order of a graph's nodes, and the values that are made of weights alone."""

    places: Mapping[ir.Node, int]
    constant: frozenset[ir.Value]

    @classmethod
    def of(cls, model: ir.Model) -> _Flow:
        constant = set(model.graph.initializers.values())
        for node in model.graph:
            if all(value is None or value in constant for value in node.inputs):
                constant.update(node.outputs)
        return cls({node: place for place, node in enumerate(model.graph)}, frozenset(constant))

    def place(self, value: ir.Value) -> int:
        """Of the node that makes a value; -1 for an input of the graph."""
        node = value.producer()
        return -1 if node is None else self.places[node]

    def crossing(self, later: Sequence[ir.Value], last: ir.Value) -> list[ir.Value]:
        """What is known once `last` is, and what these later values are made of."""
        found: dict[ir.Value, None] = {}
        end, queue, seen = self.place(last), list(later), set[ir.Value]()
        while queue:
            value = queue.pop()
            if value in seen or value in self.constant:
                continue
            seen.add(value)
            if self.place(value) <= end:
                found[value] = None
            elif (node := value.producer()) is not None:
                queue += [operand for operand in node.inputs if operand is not None]
        return sorted(found, key=lambda value: (self.place(value), name_of(value)))


def _gather(
    model: ir.Model, group: Sequence[ir.Value], crossing: Sequence[ir.Value], calls: Calls
) -> tuple[dict[str, Hessian], Calls]:
    """Run a stretch: the Hessians of its tensors, and the calls to start the next one from."""
    names, kept = [name_of(value) for value in group], [name_of(value) for value in crossing]
    requested = [f"{name}{SUFFIX}" for name in names] + [f"{name}{SUFFIX}/count" for name in names]
    passed = [name for name in kept if name in calls[0]]
    made = [name for name in kept if name not in calls[0]]
    session = lean_session(_stretch(model, calls[0], names, made))
    inputs = {value.name for value in session.get_inputs()}
    sums: dict[str, Floats] = {}
    counts = dict.fromkeys(names, 0)
    left: Calls | None = []
    for call in each("call", calls):
        carried = made if left is not None else []
        results = iter(
            session.run([*requested, *carried], {name: array for name, array in call.items() if name in inputs})
        )
        for name in names:
            matrix = next(results)
            if name in sums:
                sums[name] += matrix
            else:
                sums[name] = matrix
        for name in names:
            counts[name] += int(next(results)[0])
        if left is not None:
            left.append({name: call[name] for name in passed} | {name: next(results) for name in carried})
            if len(calls) * sum(array.nbytes for array in left[0].values()) > KEPT_BYTES:
                left = None
    for name, matrix in sums.items():
        if not np.isfinite(np.diagonal(matrix)).all():
            raise InvalidInput(
                "samples",
                f"tensor '{name}' of {model.graph.name} holds NaN, infinity or magnitudes whose squares exceed "
                "float32: "
                "it cannot be calibrated",
            )
    found = {name: Hessian(sums.pop(name), counts[name]) for name in names}
    return found, calls if left is None else left


def _stretch(model: ir.Model, call: Mapping[str, Array], names: Sequence[str], made: Sequence[str]) -> ir.Model:
    """The part of the graph between a call's inputs and these tensors. It gives X^T X and the rows of `names`, and what
    was `made`.
    """
    ends = [*dict.fromkeys([*names, *made])]
    graph = ir.convenience.extract(model.graph, list(call), ends)
    for value in graph.inputs:
        array = call[name_of(value)]
        value.dtype = ir.DataType.from_numpy(array.dtype)
        value.shape = value.shape or ir.Shape([None] * array.ndim)
    values = ir.convenience.create_value_mapping(graph)
    outputs = []
    for name in names:
        value, nodes = values[name], list[ir.Node]()
        width = _width(value)
        shape = ir.tensor(np.array([-1, width], np.int64), name=f"{name}{SUFFIX}/shape")
        sizes = ir.Value(name=shape.name, type=ir.TensorType(shape.dtype), shape=ir.Shape([2]), const_value=shape)
        graph.register_initializer(sizes)
        rows = _put(nodes, "Reshape", [value, sizes], f"{name}{SUFFIX}/rows")
        across = _put(nodes, "Transpose", [rows], f"{name}{SUFFIX}/columns", {"perm": [1, 0]})
        gram = _put(nodes, "MatMul", [across, rows], f"{name}{SUFFIX}")
        count = _put(nodes, "Shape", [rows], f"{name}{SUFFIX}/count", {"end": 1})
        gram.shape, gram.dtype = ir.Shape([width, width]), ir.DataType.FLOAT
        count.shape, count.dtype = ir.Shape([1]), ir.DataType.INT64
        graph.extend(nodes)
        outputs += [gram, count]
    graph.outputs[:] = [*outputs, *(values[name] for name in made)]
    return ir.Model(graph, ir_version=model.ir_version)


def _put(
    nodes: list[ir.Node],
    op: str,
    inputs: list[ir.Value],
    output: str,
    attributes: Mapping[str, int | list[int]] | None = None,
) -> ir.Value:
    node = ir.node(op, inputs, attributes or {}, name=f"{output}/{op}")
    node.outputs[0].name = output
    nodes.append(node)
    return node.outputs[0]
